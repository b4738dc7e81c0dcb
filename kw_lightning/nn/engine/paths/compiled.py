"""What the compiled paths have in common: what they can compute, their layouts, and vectors that narrow cells waste."""

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

# Numbers that a compiled pass takes side by side, where vectors are narrowest.
LANES = 16
# Positions from which on the products of the pass between rows, forward, make up for all other work.
LARGE_MAP = 1024
# Kernels of a batch up to which it is the faster backward: of more, it reads all cells several times.
MOST_KERNELS = 48
# Times the numbers of both maps that cells have, from which on maps whose channels come first are sooner turned.
MANY_NUMBERS = 1.5
# Positions from which on they lie along the vectors, backward, and leave few lanes of those empty.
MANY_POSITIONS = 128


class CompiledPath(Path):
    """A path by a pass in C, on a CPU in float32, to which types of two bytes are converted.

    Without units for them, products in these take the library several times as long as in float32.

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
        """Return the pass of an input [batch, in_channels, *size] as it lies in memory."""
        return self.form

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, convolution, *_ = operands
        x = first_or_last(x)
        native.forward(x, attention, cells, convolution, y, self.form_of(x, cells, convolution))

    def forward_finished(self, operands: Operands, y: Tensor, epilogue: Epilogue) -> Tensor:
        """Return what becomes of the convolution: the pass does it while it writes."""
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
    """Return why a compiled pass for convolutions of all channels together cannot compute one, None where it can."""
    if convolution.groups > 1:
        return "its products take all input channels together and know no groups"
    return None if math.prod(convolution.cell_shape[2:]) == 1 else "it takes cells of one kernel position"


def backward_form(x: Tensor, cells: Tensor, convolution: Convolution) -> native.Form:
    """Return the pass for the gradients of a dense convolution of x as it lies."""
    if suits_rows(x, cells, convolution, backward=True):
        return native.MIX_ROWS
    positions, whole = math.prod(x.shape[2:]), math.prod(convolution.cell_shape) % native.lanes() == 0
    if whole and positions >= MANY_POSITIONS and not _many_numbers(x, cells, convolution) and _is_product(convolution):
        return native.MIX_LINES
    return native.MIX_KERNELS


def suits_rows(x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool) -> bool:
    """Return whether the pass of native/mix_rows.c can compute a dense convolution of x as it lies, and is the faster.

    It reads cells as they lie, and turns kernels instead, forward: that pays where those are the fewer, **or** it is
    little work beside the products of large maps. Backward it turns nothing, but folds gradients that lie far apart,
    which pays for few kernels; there it takes maps whose channels come first, too, and turns those: that pays where
    cells have more numbers.
    """
    if not _is_product(convolution) or convolution.cell_shape[1] % native.lanes():
        return False
    kernels = len(x) * convolution.grid[1] * convolution.grid[2]
    if not backward:
        return channels_last(x) and (kernels <= len(cells) or math.prod(x.shape[2:]) >= LARGE_MAP)
    return kernels <= MOST_KERNELS and (channels_last(x) or _many_numbers(x, cells, convolution))


def _is_product(convolution: Convolution) -> bool:
    """Return whether every position of the output reads its own of the input, and no other."""
    strided = math.prod(convolution.stride) > 1 or any(convolution.padding)
    return math.prod(convolution.kernel_shape[2:]) == 1 and not strided


def _many_numbers(x: Tensor, cells: Tensor, convolution: Convolution) -> bool:
    """Return whether cells have many more numbers than both maps, of one size."""
    return cells.numel() >= MANY_NUMBERS * len(x) * math.prod(x.shape[2:]) * sum(convolution.kernel_shape[:2])


def padded_cell(convolution: Convolution, groups: int = 1) -> int:
    """Return the numbers of a cell in a compiled pass: where it has few channels, lanes of its vectors stay empty.

    Args:
        convolution: whose cell.
        groups: of the convolution that a cell spans, each with lanes of its own.
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
    """Return how many of those elements less a forward pass takes that packs no cells: half of theirs.

    It reads the cells that few kernels are mixed of as they lie.
    """
    mixtures = problem.batch * taps * problem.convolution.grid[1] * problem.convolution.grid[2]
    if problem.backward or not native.mixes_few(mixtures, problem.cells):
        return 0
    return problem.cells * padded_cell(problem.convolution) / 2
