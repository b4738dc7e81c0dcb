"""One warehouse's geometry and its size in parameters, for any number of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kw_lightning.nn.attention import attention_size
from kw_lightning.nn.partition import (
    WarehousePartition,
    common_cell_shape,
    mixture_count,
    partition,
)
from kw_lightning.planning.selection import Choice
from kw_lightning.recipe.types import Attention, Warehouse


@dataclass(frozen=True)
class Geometry:
    """A warehouse's layers and the cell that they share; the number of cells is still open.

    Attributes:
        spec: the warehouse as the recipe has it.
        choices: its layers, in module order.
        cell_shape: [co, ci, *ck].
        mixtures: m_t, of all layers.
    """

    spec: Warehouse
    choices: tuple[Choice, ...]
    cell_shape: tuple[int, ...]
    mixtures: int

    def cells_at(self, ratio: Fraction) -> int:
        """Return n = max(int(b · m_t), 1)."""
        return max(math.floor(ratio * self.mixtures), 1)

    def partition(self, *, budget: Fraction | None = None, cells: int | None = None) -> WarehousePartition:
        """Return the geometry with a budget b or a number of cells n, whichever is given."""
        cell = self.spec.cell
        return partition(
            [choice.kernel_shape for choice in self.choices],
            budget if budget is not None else 1,
            cells=cells,
            out_ratio=cell.out,
            in_ratio=cell.in_,
            spatial=cell.spatial,
            start=self.spec.attention.start,
        )

    def attention_sizes(self, geometry: WarehousePartition) -> tuple[int, ...]:
        """Return the parameters of each layer's attention."""
        return tuple(
            attention_parameters(
                self.spec.attention, choice, share.mixtures, share.cells, share.budget, dynamic=self.spec.dynamic
            )
            for choice, share in zip(self.choices, geometry.layers, strict=True)
        )

    def size(self, cells: int) -> int:
        """Return the parameters of n cells and of the attention that goes with them."""
        return self.size_of(self.partition(cells=cells))

    def size_of(self, geometry: WarehousePartition) -> int:
        """Return the parameters of a geometry's cells and of its attention."""
        return geometry.cells * math.prod(self.cell_shape) + sum(self.attention_sizes(geometry))


def attention_form(spec: Warehouse) -> dict[str, Any]:
    """Return how the attention of a warehouse's layers is made, as keyword arguments of `attach_warehouse`."""
    names = ("function", "start", *(("reduction", "norm", "basis", "gates") if spec.dynamic else ()))
    return {"dynamic": spec.dynamic, **{name: getattr(spec.attention, name) for name in names}}


def attention_parameters(
    attention: Attention, choice: Choice, mixtures: int, cells: int, budget: Fraction, *, dynamic: bool = True
) -> int:
    """Return the parameters of one layer's attention.

    Args:
        attention: as the recipe has it.
        choice: the layer.
        mixtures: m, of the layer.
        cells, budget: n and b, of the warehouse.
        dynamic: whether every sample has weights of its own.
    """
    return attention_size(
        choice.layer.in_channels,
        mixtures,
        cells,
        budget,
        reduction=attention.reduction,
        norm=attention.norm,
        basis=attention.basis,
        function=attention.function,
        gated_channels=gated_channels(attention, choice),
        dynamic=dynamic,
    )


def gated_channels(attention: Attention, choice: Choice) -> int:
    """Return how many channels of a layer have gates, those of its input and of its output together."""
    channels = {"input": choice.layer.in_channels, "output": choice.kernel_shape[0]}
    return sum(channels[side] for side in attention.gates)


def measure(spec: Warehouse, choices: Sequence[Choice]) -> Geometry:
    """Return the cell that the layers share and how many mixtures they have.

    Raises:
        PartitionError: kernels that cannot share cells.
    """
    shapes = [choice.kernel_shape for choice in choices]
    cell_shape = common_cell_shape(shapes, spec.cell.out, spec.cell.in_, spec.cell.spatial)
    return Geometry(spec, tuple(choices), cell_shape, sum(mixture_count(shape, cell_shape) for shape in shapes))
