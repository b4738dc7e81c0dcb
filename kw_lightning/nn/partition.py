"""Kernel partition and cell allotment: the geometry of a warehouse, as pure functions.

Paper: "KernelWarehouse: Rethinking the Design of Dynamic Convolution" (ICML 2024), sections 3.1 (kernel partition),
3.2 (warehouse construction with sharing) and 3.3 (the start value β of the attention).
https://arxiv.org/abs/2406.07879

Departure from the published code, where that would index outside the warehouse: under a budget whose inverse is no
whole number, taking a cell every int(1/b) mixtures asks for more than there are; they are then dealt out evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kw_lightning.errors import mistake, times

Shape = tuple[int, ...]
Ratio = Fraction | int | float
Start = Literal["own", "shared", "none"]
STARTS: tuple[Start, ...] = ("own", "shared", "none")
Spatial = Literal["split", "whole"]
SPATIAL: tuple[Spatial, ...] = ("split", "whole")


class PartitionError(ValueError):
    """Kernels that cannot share a warehouse; the message says which numbers do not fit."""


@dataclass(frozen=True)
class LayerPartition:
    """How one layer's kernel is cut into cell-sized mixtures.

    Attributes:
        kernel_shape: [out_channels, in_channels / groups, *kernel_size]; of a linear layer [out, in].
        cell_shape: [co, ci, *ck].
        cells: n, the cells of the whole warehouse.
        first_cell: the layer's first own cell.
        own_cells: how many cells the layer's mixtures start from.
        initial_cells: β as one index per mixture: the cell that it starts as; n means the zero cell. An attention
            without a start knows nothing of it.
        budget: b of the warehouse.
    """

    kernel_shape: Shape
    cell_shape: Shape
    cells: int
    first_cell: int
    own_cells: int
    initial_cells: tuple[int, ...]
    budget: Fraction

    @property
    def grid(self) -> tuple[Shape, int, int]:
        """Return (spatial cells per dimension, output groups, input groups): the mixtures, slowest first."""
        return mixture_grid(self.kernel_shape, self.cell_shape)

    @property
    def mixtures(self) -> int:
        """Return m, the number of mixtures of the layer."""
        return len(self.initial_cells)


@dataclass(frozen=True)
class WarehousePartition:
    """The geometry of one warehouse: n cells of `cell_shape`, and each layer's part of the m_t mixtures."""

    cells: int
    cell_shape: Shape
    layers: tuple[LayerPartition, ...]

    @property
    def mixtures(self) -> int:
        """Return m_t, the number of mixtures of all layers."""
        return sum(layer.mixtures for layer in self.layers)

    @property
    def budget(self) -> Fraction:
        """Return the budget reached, b = n / m_t."""
        return Fraction(self.cells, self.mixtures)


def common_cell_shape(
    kernel_shapes: Sequence[Shape],
    out_ratio: Ratio = 1,
    in_ratio: Ratio = 1,
    spatial: Spatial = "split",
) -> Shape:
    """Return the cell shape [co, ci, *ck] that the given kernels share.

    Args:
        kernel_shapes: [out_channels, in_channels / groups, *kernel_size] of every layer.
        out_ratio, in_ratio: cell size relative to the common divisor of the output and of the input channels.
        spatial: "split" cuts kernels into 1×1 positions; "whole" keeps them, and then all must be of one size.

    Raises:
        PartitionError: no kernels; kernels of different dimensions; "whole" and unequal kernel sizes;
            a cell that does not divide a kernel; **or** another `spatial`.
    """
    if spatial not in SPATIAL:
        raise PartitionError(mistake(spatial, SPATIAL, what="the unknown spatial"))
    if not kernel_shapes:
        raise PartitionError("a warehouse needs at least one layer")
    dimensions = sorted({len(shape) - 2 for shape in kernel_shapes})
    if len(dimensions) > 1:
        found = " and ".join(f"{d}-dimensional" for d in dimensions)
        raise PartitionError(f"kernels of different dimensions cannot share cells: found {found} kernels")
    kernel_sizes = sorted({shape[2:] for shape in kernel_shapes})
    if spatial == "whole" and len(kernel_sizes) > 1:
        found = ", ".join(times(size) for size in kernel_sizes)
        raise PartitionError(f"unsplit cells need kernels of one size: found {found}")
    out_divisor = math.gcd(*(shape[0] for shape in kernel_shapes))
    in_divisor = math.gcd(*(shape[1] for shape in kernel_shapes))
    cell_out = max(math.floor(out_divisor * _exact(out_ratio)), 1)
    cell_in = max(math.floor(in_divisor * _exact(in_ratio)), 1)
    cell_size = kernel_sizes[0] if spatial == "whole" else (1,) * dimensions[0]
    if out_divisor % cell_out:
        raise PartitionError(_indivisible("output", out_divisor, out_ratio, cell_out))
    if in_divisor % cell_in:
        raise PartitionError(_indivisible("input", in_divisor, in_ratio, cell_in))
    return (cell_out, cell_in, *cell_size)


def mixture_grid(kernel_shape: Shape, cell_shape: Shape) -> tuple[Shape, int, int]:
    """Return (spatial cells per dimension, output groups, input groups) of a kernel cut into cells."""
    spatial = tuple(k // c for k, c in zip(kernel_shape[2:], cell_shape[2:], strict=True))
    return spatial, kernel_shape[0] // cell_shape[0], kernel_shape[1] // cell_shape[1]


def mixture_count(kernel_shape: Shape, cell_shape: Shape) -> int:
    """Return m, the number of cell-sized mixtures in a kernel."""
    spatial, out_groups, in_groups = mixture_grid(kernel_shape, cell_shape)
    return math.prod(spatial) * out_groups * in_groups


def partition(
    kernel_shapes: Sequence[Shape],
    budget: Ratio = 1,
    *,
    cells: int | None = None,
    out_ratio: Ratio = 1,
    in_ratio: Ratio = 1,
    spatial: Spatial = "split",
    start: Start = "own",
) -> WarehousePartition:
    """Cut the kernels of a warehouse's layers into cells and allot each layer its first cells.

    Args:
        kernel_shapes: [out_channels, in_channels / groups, *kernel_size] of every layer, in the network's order.
        budget: b, cells per mixture; n = max(int(b · m_t), 1).
        cells: n itself; `budget` is then n / m_t.
        out_ratio, in_ratio, spatial: see `common_cell_shape`.
        start: "shared" deals a layer's own cells out evenly over its mixtures, neighbours first, so that a budget
            under 1 starts several from one cell and none from the zero cell; from 1 on it is what "own" is, one cell
            to one mixture. "none" leaves the geometry as "own" does.

    Raises:
        PartitionError: see `common_cell_shape`; a budget or a cell count that is not positive; **or** another `start`.
    """
    if start not in STARTS:
        raise PartitionError(mistake(start, STARTS, what="the unknown start"))
    cell_shape = common_cell_shape(kernel_shapes, out_ratio, in_ratio, spatial)
    mixtures = [mixture_count(shape, cell_shape) for shape in kernel_shapes]
    if cells is not None:
        if cells < 1:
            raise PartitionError(f"a warehouse needs at least one cell: found {cells}")
        ratio = Fraction(cells, sum(mixtures))
    else:
        ratio = _exact(budget)
        if ratio <= 0:
            raise PartitionError(f"a budget must be greater than 0: found {budget}")
        cells = max(math.floor(ratio * sum(mixtures)), 1)
    allotted = _allot(mixtures, ratio, cells)
    layers = []
    first_cell = 0
    for kernel_shape, initial in zip(kernel_shapes, allotted, strict=True):
        own = sum(index is not None for index in initial) if ratio < 1 else len(initial) * math.floor(ratio)
        # Past the last cell there is only the zero cell.
        columns = tuple(cells if index is None or index >= cells else index for index in initial)
        own = max(min(own, cells - first_cell), 0)
        if start == "shared":  # a layer too small for a cell of its own starts as its neighbour's first
            columns = tuple(min(first_cell + i * own // len(initial), cells - 1) for i in range(len(initial)))
        layers.append(LayerPartition(tuple(kernel_shape), cell_shape, cells, first_cell, own, columns, ratio))
        first_cell += own
    return WarehousePartition(cells, cell_shape, tuple(layers))


def _allot(mixtures: Sequence[int], ratio: Fraction, cells: int) -> list[list[int | None]]:
    """Return, per layer and mixture, the cell it starts as, None for the zero cell (paper, section 3.3)."""
    if ratio >= 1:
        return _take(mixtures, step=math.floor(ratio), every=1)
    inverse = 1 / ratio
    taken = _take(mixtures, step=1, every=math.floor(inverse))
    return taken if inverse.denominator == 1 or _last(taken) <= cells else _spread(mixtures, cells)


def _take(mixtures: Sequence[int], step: int, every: int) -> list[list[int | None]]:
    next_cell = _counter(step)
    return [
        [next(next_cell) if i % every == (i // every) % every else None for i in range(count)] for count in mixtures
    ]


def _spread(mixtures: Sequence[int], cells: int) -> list[list[int | None]]:
    """Deal the cells out evenly over the mixtures of all layers, each cell once."""
    total = sum(mixtures)
    shares = [(k * cells // total, (k + 1) * cells // total) for k in range(total)]
    dealt = iter([first if last > first else None for first, last in shares])
    return [[next(dealt) for _ in range(count)] for count in mixtures]


def _counter(step: int) -> Iterator[int]:
    value = 0
    while True:
        yield value
        value += step


def _last(allotted: Sequence[Sequence[int | None]]) -> int:
    return max((index for layer in allotted for index in layer if index is not None), default=0)


def _exact(ratio: Ratio) -> Fraction:
    # 0.1 means one tenth, not the nearest binary number.
    return ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))


def _indivisible(side: str, divisor: int, ratio: Ratio, size: int) -> str:
    return (
        f"a cell of {size} {side} channels (common divisor {divisor} × {ratio}) does not divide {divisor}; "
        f"allowed are the divisors of {divisor}"
    )
