"""Budgets: what is asked, what is reached, and what is out of reach."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from networks import TinyResNet, recipe

from kw_lightning.builder import apply_plan
from kw_lightning.errors import RecipeError
from kw_lightning.planning import Plan, plan

WAREHOUSES = {
    "first": {"layers": ["layer1.*"]},
    "second": {"layers": ["layer2.*.conv2", "layer2.1.conv1"], "budget": 2},
}


def planned(warehouses: Any, budget: Any = None) -> Plan:
    """Return the plan of the small network, with a budget for the whole recipe if given."""
    model = {} if budget is None else {"model": {"backbone": "torchvision/resnet18", "budget": budget}}
    return plan(recipe(warehouses, **model), TinyResNet())


def one(budget: Any, **others: Any) -> Any:
    """Return the plan of one warehouse with a budget."""
    return planned({"a": {"layers": ["layer1.*"], "budget": budget, **others}}).warehouses[0]


@pytest.mark.parametrize(
    ("budget", "cells"), [(1, 36), ("1/2", 18), (0.25, 9), (4, 144), ({"cells": 7}, 7), ("1/1000", 1)]
)
def test_a_budget_buys_so_many_cells(budget: Any, cells: int) -> None:
    assert one(budget).partition.cells == cells


@pytest.mark.parametrize("others", [{}, {"attention": {"basis": "1/4"}}, {"cell": {"out": "1/2"}}])
@pytest.mark.parametrize("parameters", [11_000, 12_345, 40_000])
def test_parameters_buy_the_most_cells(parameters: int, others: dict[str, Any]) -> None:
    warehouse = one({"parameters": parameters}, **others)
    reached = warehouse.cell_parameters + warehouse.attention_parameters
    assert reached <= parameters
    more = one({"cells": warehouse.partition.cells + 1}, **others)
    assert more.cell_parameters + more.attention_parameters > parameters


def test_parameters_written_short() -> None:
    assert one({"parameters": "5K"}).partition == one({"parameters": 5000}).partition


@pytest.mark.parametrize("parameters", [10_000, 14_000, 20_000, 60_000])
def test_a_budget_for_the_whole_recipe(parameters: int) -> None:
    found = planned(WAREHOUSES, {"parameters": parameters})
    assert found.parameters.kw <= parameters
    first, second = found.warehouses
    for warehouse in (first, second):  # not one cell more fits
        cells = {w.name: w.partition.cells + (w is warehouse) for w in found.warehouses}
        larger = planned({n: {"layers": w["layers"], "budget": {"cells": cells[n]}} for n, w in WAREHOUSES.items()})
        assert larger.parameters.kw > parameters
    # the recipe's proportion, to a cell
    assert abs(second.partition.cells - 2 * first.budget * second.partition.mixtures) <= 3
    model = TinyResNet()
    apply_plan(found, model)
    assert sum(p.numel() for p in model.parameters()) == found.parameters.kw


def test_relative_to_the_static_network() -> None:
    resnet = recipe(model={"backbone": "torchvision/resnet18", "budget": {"relative": 1}}, stages="auto")
    found = plan(resnet)
    assert found.parameters.static - 70_000 < found.parameters.kw <= found.parameters.static
    assert found.to_dict()["budget"] == "relative 1"
    half = plan(recipe(model={"backbone": "torchvision/resnet18", "budget": {"relative": "1/2"}}, stages="auto"))
    assert half.parameters.kw <= half.parameters.static // 2
    assert half.parameters.kw > half.parameters.static // 2 - 70_000


def test_fixed_warehouses_keep_their_budget() -> None:
    warehouses = {**WAREHOUSES, "second": {**WAREHOUSES["second"], "budget": {"cells": 5}}}
    found = planned(warehouses, {"parameters": 14_000})
    assert found.warehouses[1].partition.cells == 5
    assert found.parameters.kw <= 14_000


@pytest.mark.parametrize(
    ("warehouses", "budget", "message"),
    [
        (
            {"a": {"layers": ["layer1.*"], "budget": {"parameters": 100}}},
            None,
            'warehouses.a.budget: warehouse "a" cannot',
        ),
        (
            WAREHOUSES,
            {"parameters": 1000},
            "model.budget: the network cannot have 1,000 parameters, attention included",
        ),
        (WAREHOUSES, {"parameters": "9G"}, "reachable are "),
        ({"a": {"layers": ["fc"], "budget": {"cells": 1}}}, {"relative": 1}, "no warehouse has a budget that could be"),
    ],
)
def test_out_of_reach(warehouses: Any, budget: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(warehouses, budget)
    assert message in str(caught.value)


def test_reachable_range_is_reachable() -> None:
    with pytest.raises(RecipeError) as caught:
        planned(WAREHOUSES, {"parameters": 1})
    words = str(caught.value).replace(",", "").split()
    least = int(words[words.index("are") + 1])
    found = planned(WAREHOUSES, {"parameters": least})
    assert [warehouse.partition.cells for warehouse in found.warehouses] == [1, 1]
    assert found.parameters.kw == least
    assert found.warehouses[0].budget == Fraction(1, 36)
