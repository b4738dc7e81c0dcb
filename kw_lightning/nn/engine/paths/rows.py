"""What the paths made of matrix products on channels-last rows have in common."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.layouts import channels_last
from kw_lightning.nn.engine.orders import count
from kw_lightning.nn.engine.paths.path import Path, order_of
from kw_lightning.nn.engine.problem import Operands, Problem
from kw_lightning.nn.engine.taps import Taps, find_taps, identity, put, take


class Rows(NamedTuple):
    """The tensors of a convolution as these paths take them: channels last, one kernel position per cell, live taps.

    Attributes:
        x: [batch, *size, in_channels].
        attention: α [batch, positions, output groups, input groups, cells].
        cells: E [cells, co, ci].
        taps: one for each of α's positions.
    """

    x: Tensor
    attention: Tensor
    cells: Tensor
    taps: Taps


class RowsPath(Path):
    """A path of matrix products: it computes on `Rows`, which this class makes from the operands."""

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can.

        Cells span one kernel position or all of them, which is what a partition gives.
        """
        convolution = problem.convolution
        if convolution.groups > 1:
            return "its products take all input channels together and know no groups"
        whole = convolution.cell_shape[2:] == convolution.kernel_shape[2:]
        split = math.prod(convolution.cell_shape[2:]) == 1
        return None if split or whole else "it takes cells of one kernel position or of all"

    def takes_any_layout(self, taps: Taps) -> bool:
        """Return whether the path takes maps of any memory format for these taps."""
        return False

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel.

        Args:
            form: the operands.
            y: [batch, *output_size, out_channels], overwritten.
        """
        raise NotImplementedError

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients.

        Args:
            gradient: of the output, [batch, *output_size, out_channels].
            form: the operands.
            found: where the gradients go, each laid out as its operand.
        """
        raise NotImplementedError

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        layout = _Layout(operands, self)
        out = y.movedim(1, -1)
        if layout.direct or out.is_contiguous():
            self.forward_rows(layout.form, out)
            return
        rows = torch.empty_like(out, memory_format=torch.contiguous_format)
        self.forward_rows(layout.form, rows)
        y.copy_(rows.movedim(-1, 1))

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients."""
        layout = _Layout(operands, self)
        x, attention, cells, _ = layout.form
        rows = gradient.movedim(1, -1)
        found = new_gradients(x, attention, cells, needed)
        self.backward_rows(rows if layout.direct else rows.contiguous(), layout.form, found)
        return Gradients(
            None if found.x is None else layout.put_back(found.x, operands.x),
            None if found.attention is None else layout.put_back_attention(found.attention, operands.attention),
            None if found.cells is None else found.cells.view(operands.cells.shape),
        )


class RowSizes(NamedTuple):
    """The sizes of the products of a problem.

    Attributes:
        live: kernel positions that read anything but padding; 1 where cells span the kernel.
        inputs, outputs: positions between which there are products.
        phase: positions of a phase image, of which each tap reads one: see taps.py.
        co, ci: of a cell, all its kernel positions among ci.
        out_groups, in_groups: cells along the kernel.
        maps: elements of a sample's input and output.
        patches: elements of a sample's wide pixels where cells span the kernel, else none.
        stored: elements of E.
    """

    live: int
    inputs: int
    outputs: int
    phase: int
    co: int
    ci: int
    out_groups: int
    in_groups: int
    maps: tuple[int, int]
    patches: int
    stored: int


def row_sizes(problem: Problem) -> RowSizes:
    """Return the sizes of the products of a problem."""
    convolution = problem.convolution
    _, out_groups, in_groups = convolution.grid
    co, ci, *cell_size = convolution.cell_shape
    taps = find_taps(convolution, problem.size)
    inputs, outputs = math.prod(problem.size), math.prod(taps.output_size)
    phase = math.prod(-(-n // s) for n, s in zip(problem.size, taps.stride, strict=True))
    maps = convolution.kernel_shape[1] * inputs, convolution.kernel_shape[0] * outputs
    stored = problem.cells * math.prod(convolution.cell_shape)
    if math.prod(cell_size) == 1:
        live = max(len(taps.taps), 1)
        return RowSizes(live, inputs, outputs, phase, co, ci, out_groups, in_groups, maps, 0, stored)
    ci *= math.prod(cell_size)  # a 1×1 convolution of wide pixels
    patches = outputs * in_groups * ci
    return RowSizes(1, outputs, outputs, outputs, co, ci, out_groups, in_groups, maps, patches, stored)


def multiply_adds(path: Path, problem: Problem, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the multiply-adds of (mixing, products) of the batch, without kernel positions that read only padding.

    Args:
        inputs, outputs: positions between which the path computes.
    """
    convolution = problem.convolution
    counted = count(order_of(path), convolution, problem.cells, inputs, outputs)
    alive = row_sizes(problem).live / math.prod(convolution.grid[0])
    shared = alive if order_of(path) == "mix_kernels" else 1.0  # of the other orders all positions share the products
    return problem.batch * counted.mixing * alive, problem.batch * counted.products * shared


class _Layout:
    """The operands as rows, and their gradients back as the operands are.

    Where cells span the whole kernel, every output position's patch of the input becomes one wide pixel of a 1×1
    convolution.

    Attributes:
        form: the operands.
        live: which of all kernel positions the form's taps are.
        direct: the form's x is the caller's memory, in any format: the path needs no copy.
    """

    def __init__(self, operands: Operands, path: RowsPath) -> None:
        x, attention, cells, convolution, *_ = operands
        rows = x.movedim(1, -1)
        self.grid = convolution.grid
        self.read = find_taps(convolution, tuple(x.shape[2:]))
        self.patches = math.prod(convolution.cell_shape[2:]) > 1
        self.direct = not self.patches and path.takes_any_layout(self.read)
        if self.patches:
            cells = cells.flatten(2).contiguous()
            taps = identity(self.read.output_size)
            self.live: tuple[int, ...] = (0,)
            rows = self._patches(rows, cells)
        else:
            cells = cells.reshape(cells.shape[:3])
            taps, self.live = self.read, self.read.live
            rows = rows if self.direct else rows.contiguous()
        self.form = Rows(rows, take(self.split(attention), self.live), cells, taps)

    def split(self, attention: Tensor) -> Tensor:
        """Return α [batch, mixtures, cells] by position, output group and input group."""
        spatial, out_groups, in_groups = self.grid
        return attention.view(len(attention), math.prod(spatial), out_groups, in_groups, -1)

    def put_back(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of the input [batch, in_channels, *size] from that of the rows."""
        if not self.patches:
            gradient = gradient.movedim(-1, 1)
            return gradient if self.direct or channels_last(x) else gradient.contiguous()
        total = torch.zeros_like(x)
        gradient = gradient.unflatten(-1, (x.shape[1], -1))
        for tap, position in zip(self.read.taps, self.read.live, strict=True):
            self.read.add_back(gradient[..., position], tap, total.movedim(1, -1))
        return total

    def put_back_attention(self, gradient: Tensor, attention: Tensor) -> Tensor:
        """Return the gradient of α [batch, mixtures, cells] from that of the live positions."""
        if gradient.numel() == attention.numel():
            return gradient.reshape(attention.shape)
        total = gradient.new_zeros(attention.shape)
        put(self.split(total), self.live, gradient)
        return total

    def _patches(self, rows: Tensor, cells: Tensor) -> Tensor:
        channels = rows.shape[-1]
        positions = cells.shape[2] // (channels // self.grid[2])
        patches = rows.new_zeros(len(rows), *self.read.output_size, channels, positions)
        for tap, position in zip(self.read.taps, self.read.live, strict=True):
            self.read.read(rows, tap, patches[..., position])
        return patches.flatten(-2)
