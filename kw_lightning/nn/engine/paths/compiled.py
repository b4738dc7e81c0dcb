"""What the compiled paths have in common: what they can compute, layouts, and lanes that narrow cells waste."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.layouts import channels_last, first_or_last
from kw_lightning.nn.engine.paths.path import Path
from kw_lightning.nn.engine.problem import Operands, Problem

# Lanes of a compiled pass where vectors are narrowest.
LANES = 16
# Positions from which on, forward, the faster products of native/mix_rows.c outweigh its other work.
LARGE_MAP = 1024
# Kernels of a batch up to which it is also faster backward: with more, it reads all cells several times.
MOST_KERNELS = 48
# Ratio of the numbers of cells to those of both maps from which on transposing maps with channels first pays.
MANY_NUMBERS = 1.5
# Positions from which on, backward, vectors of positions leave few lanes empty.
MANY_POSITIONS = 128


class CompiledPath(Path):
    """A path by a pass in C, on a CPU in float32, to which 16-bit types are converted.

    On processors without 16-bit units, PyTorch's products take several times as long in these types as in float32.

    Attributes:
        form: the pass.
    """

    form: ClassVar[native.Form]

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can."""
        reason = self.refuses(problem.convolution)
        if reason is not None:
            return reason
        if self.precision(problem.dtype) != torch.float32 or not problem.on_cpu:
            where = f"{str(problem.dtype).removeprefix('torch.')} on {problem.device.type}"
            return f"it computes in float32 on a CPU, not in {where}"
        return None if native.available() else "no compiled passes are available here"

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which it computes on tensors of a type, which are converted for it."""
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can."""
        return dense_refusal(convolution)

    def form_of(self, x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool = False) -> native.Form:
        """Return the pass for the memory layout of an input [batch, in_channels, *size]."""
        return self.form

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, convolution, *_ = operands
        x = first_or_last(x)
        native.forward(x, attention, cells, convolution, y, self.form_of(x, cells, convolution))

    def forward_finished(self, operands: Operands, y: Tensor, epilogue: Epilogue) -> Tensor:
        """Return the convolution after the epilogue, which the pass applies as it writes."""
        if not epilogue.fits(y):
            return super().forward_finished(operands, y, epilogue)
        x, attention, cells, convolution, *_ = operands
        x = first_or_last(x)
        native.forward(x, attention, cells, convolution, y, self.form_of(x, cells, convolution), epilogue)
        return y

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients."""
        _, attention, cells, convolution, *_ = operands
        x = first_or_last(operands.x)
        found = new_gradients(x, attention, cells, needed, operands.collected)
        native.backward(
            first_or_last(gradient),
            x,
            attention,
            cells,
            convolution,
            found,
            self.form_of(x, cells, convolution, backward=True),
        )
        return found


def dense_refusal(convolution: Convolution) -> str | None:
    """Return why a compiled pass for dense convolutions cannot compute this one, None where it can."""
    if convolution.groups > 1:
        return "its products take all input channels together and know no groups"
    return None if math.prod(convolution.cell_shape[2:]) == 1 else "it takes cells of one kernel position"


def backward_form(x: Tensor, cells: Tensor, convolution: Convolution) -> native.Form:
    """Return the pass for the gradients of a dense convolution of x, given its memory layout."""
    if suits_rows(x, cells, convolution, backward=True):
        return native.MIX_ROWS
    positions, whole = math.prod(x.shape[2:]), math.prod(convolution.cell_shape) % native.lanes() == 0
    if whole and positions >= MANY_POSITIONS and not _many_numbers(x, cells, convolution) and _is_product(convolution):
        return native.MIX_LINES
    return native.MIX_KERNELS


def suits_rows(x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool) -> bool:
    """Return whether the pass of native/mix_rows.c can compute a dense convolution of x in its layout, and is faster.

    Forward it transposes kernels instead of packing cells: that pays if there are fewer kernels than cells, **or** if
    it is little work beside the products of large maps. Backward it transposes neither, but adds up gradients that are
    far apart in memory, which pays for few kernels. There it also takes maps with channels first and transposes them,
    which pays if cells have many more numbers.
    """
    if not _is_product(convolution) or convolution.cell_shape[1] % native.lanes():
        return False
    kernels = len(x) * convolution.grid[1] * convolution.grid[2]
    if not backward:
        return channels_last(x) and (kernels <= len(cells) or math.prod(x.shape[2:]) >= LARGE_MAP)
    return kernels <= MOST_KERNELS and (channels_last(x) or _many_numbers(x, cells, convolution))


def _is_product(convolution: Convolution) -> bool:
    """Return whether every position of the output reads the same position of the input, and no other."""
    strided = math.prod(convolution.stride) > 1 or any(convolution.padding)
    return math.prod(convolution.kernel_shape[2:]) == 1 and not strided


def _many_numbers(x: Tensor, cells: Tensor, convolution: Convolution) -> bool:
    """Return whether cells have many more numbers than both maps, which are of the same size."""
    return cells.numel() >= MANY_NUMBERS * len(x) * math.prod(x.shape[2:]) * sum(convolution.kernel_shape[:2])


def padded_cell(convolution: Convolution, groups: int = 1) -> int:
    """Return the numbers of a cell in a compiled pass, with the lanes that stay empty if it has few channels.

    Args:
        convolution: of the cell.
        groups: how many of the convolution's groups a cell spans, each in lanes of its own.
    """
    co, ci = convolution.cell_shape[:2]
    return groups * -(-co // (groups * LANES)) * LANES * ci


def moved(problem: Problem) -> int:
    """Return the elements that a compiled pass moves: both maps, and the cells, which are packed."""
    convolution = problem.convolution
    channels = convolution.kernel_shape[1] * convolution.groups, convolution.kernel_shape[0]
    sizes = math.prod(problem.size), math.prod(convolution.output_size(problem.size))
    maps = sum(count * positions for count, positions in zip(channels, sizes, strict=True))
    return problem.batch * maps + problem.cells * padded_cell(convolution)


def spared(problem: Problem, taps: int) -> float:
    """Return how many elements fewer than `moved` a forward pass moves if it packs no cells: half of the cells'.

    It packs none if few kernels are mixed from them.
    """
    mixtures = problem.batch * taps * problem.convolution.grid[1] * problem.convolution.grid[2]
    if problem.backward or not native.mixes_few(mixtures, problem.cells):
        return 0
    return problem.cells * padded_cell(problem.convolution) / 2
