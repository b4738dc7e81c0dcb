"""The plan: what stands between a recipe and a network. The builder only executes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from kw_lightning.nn.partition import LayerPartition, WarehousePartition
from kw_lightning.notebook import rich_html
from kw_lightning.planning.network import Layer
from kw_lightning.planning.selection import Choice
from kw_lightning.recipe.types import Attention, Budget, Recipe, Warehouse


class Count(NamedTuple):
    """A figure of the static network and of the one with warehouses."""

    static: int
    kw: int

    @property
    def ratio(self) -> float:
        """Return the second relative to the first."""
        return self.kw / max(self.static, 1)


@dataclass(frozen=True)
class LayerPlan:
    """One dynamic layer, or the dynamic part of one.

    Attributes:
        layer: the static layer that it replaces.
        rows: the output channels (from, to) that become dynamic; None means all.
        partition: its share of the warehouse.
        attention_parameters: of its attention.
        macs: multiply-adds for one sample; of the kw figure the attention and the mixing are part. None if unknown.
        inputs: shape of the input in every call for one sample, as far as the forward pass is known.
    """

    layer: Layer
    rows: tuple[int, int] | None
    partition: LayerPartition
    attention_parameters: int
    macs: Count | None = None
    inputs: tuple[tuple[int, ...], ...] = ()

    @property
    def choice(self) -> Choice:
        """Return the layer and its rows, as the warehouse takes them."""
        return Choice(self.layer, self.rows)

    @property
    def name(self) -> str:
        """Return the layer's name, with the rows as a slice behind it."""
        return self.choice.name

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data."""
        return {
            "name": self.name,
            "type": self.layer.type,
            "kernel_shape": list(self.partition.kernel_shape),
            "mixtures": self.partition.mixtures,
            "first_cell": self.partition.first_cell,
            "attention_parameters": self.attention_parameters,
            "macs": None if self.macs is None else self.macs._asdict(),
        }


@dataclass(frozen=True)
class WarehousePlan:
    """One warehouse: its geometry and its layers, in module order."""

    spec: Warehouse
    partition: WarehousePartition
    layers: tuple[LayerPlan, ...]
    divisors: tuple[int, int]

    @property
    def name(self) -> str:
        """Return the name in the recipe."""
        return self.spec.name

    @property
    def attention(self) -> Attention:
        """Return how the attention of the layers is made."""
        return self.spec.attention

    @property
    def asked(self) -> Budget:
        """Return the budget that the recipe asks for."""
        return self.spec.budget

    @property
    def budget(self) -> Fraction:
        """Return the budget reached, b = n / m_t."""
        return self.partition.budget

    @property
    def cell_parameters(self) -> int:
        """Return the parameters of the cells."""
        return self.partition.cells * math.prod(self.partition.cell_shape)

    @property
    def attention_parameters(self) -> int:
        """Return the parameters of all layers' attention."""
        return sum(layer.attention_parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the warehouse as plain data."""
        return {
            "name": self.name,
            "cells": self.partition.cells,
            "cell_shape": list(self.partition.cell_shape),
            "mixtures": self.partition.mixtures,
            "divisors": list(self.divisors),
            "budget": {"asked": budget_text(self.asked), "reached": float(self.budget)},
            "parameters": {"cells": self.cell_parameters, "attention": self.attention_parameters},
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class StaticLayer:
    """A convolution or linear layer that stays as it is, and why."""

    layer: Layer
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that making a network dynamic will do, worked out without making it.

    Attributes:
        recipe: what it was made from; `warehouses` has the ones of `stages: auto` too.
        warehouses: in the recipe's order.
        static_layers: the layers left static.
        parameters: of the whole network, static and with warehouses.
        macs: multiply-adds for one sample of `input_shape`; None if unknown, and `macs_note` says why.
        input_shape: [channels, *size] of one sample, if known.
        warning: what is out of proportion, see `proportion.py`; None when nothing is.
        trains: beside adapters, which of the network's own parameters are trained; None where there are no adapters.
        trainable: how many numbers train then, cells and attention included.
    """

    recipe: Recipe
    warehouses: tuple[WarehousePlan, ...]
    static_layers: tuple[StaticLayer, ...]
    parameters: Count
    macs: Count | None = None
    macs_note: str | None = None
    input_shape: tuple[int, ...] | None = None
    warning: str | None = None
    trains: frozenset[str] | None = None
    trainable: int | None = None

    @property
    def asked(self) -> Budget | None:
        """Return the budget for the whole recipe, if it has one."""
        return self.recipe.model.budget if self.recipe.model is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "name": self.recipe.name,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "budget": None if self.asked is None else budget_text(self.asked),
            "parameters": self.parameters._asdict(),
            "macs": None if self.macs is None else self.macs._asdict(),
            "macs_note": self.macs_note,
            "warning": self.warning,
            **({} if self.trainable is None else {"trainable": self.trainable}),
            "warehouses": [warehouse.to_dict() for warehouse in self.warehouses],
            "static_layers": [
                {"name": static.layer.name, "type": static.layer.type, "reason": static.reason}
                for static in self.static_layers
            ],
        }

    def _repr_html_(self) -> str:
        from kw_lightning.planning.table import PlanTable  # which is made of plans

        return rich_html(PlanTable(self))


def budget_text(budget: Budget) -> str:
    """Return a budget as one writes it in a recipe."""
    if budget.cells is not None:
        return f"{budget.cells} cells"
    if budget.parameters is not None:
        return f"{budget.parameters} parameters"
    if budget.relative is not None:
        return f"relative {budget.relative}"
    return str(budget.ratio)
