"""The figures in which plans differ, side by side."""

from __future__ import annotations

from typing import Any

from kw_lightning.errors import times
from kw_lightning.planning.types import Plan, WarehousePlan


def different_figures(*plans: Plan) -> list[tuple[Any, ...]]:
    """Return the figures in which plans differ: (what, in the first, in the second, …), None for what is not there."""
    warehouses = [{warehouse.name: _warehouse_figures(warehouse) for warehouse in plan.warehouses} for plan in plans]
    rows: list[tuple[Any, ...]] = []
    for name in dict.fromkeys(name for found in warehouses for name in found):
        figures = [found.get(name, {}) for found in warehouses]
        for what in dict.fromkeys(what for found in figures for what in found):
            rows.append((f"{name}: {what}", *(found.get(what) for found in figures)))
    totals = [_network_figures(plan) for plan in plans]
    rows += [(f"network: {what}", *(total[what] for total in totals)) for what in totals[0]]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def _network_figures(plan: Plan) -> dict[str, int | None]:
    return {
        "parameters": plan.parameters.kw,
        "parameters, static": plan.parameters.static,
        "multiply-adds": plan.macs.kw if plan.macs else None,
        "multiply-adds, static": plan.macs.static if plan.macs else None,
    }


def _warehouse_figures(warehouse: WarehousePlan) -> dict[str, Any]:
    return {
        "layers": len(warehouse.layers),
        "cell": times(warehouse.partition.cell_shape),
        "mixtures": warehouse.partition.mixtures,
        "cells": warehouse.partition.cells,
        "cell parameters": warehouse.cell_parameters,
        "attention parameters": warehouse.attention_parameters,
        "multiply-adds": sum(layer.macs.kw for layer in warehouse.layers if layer.macs) or None,
    }
