"""What holds for every recipe: it is refused with a message, or the network built is the one planned."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from networks import TinyResNet, recipe
from torch import nn

from kw_lightning.builder import apply_plan
from kw_lightning.errors import RecipeError
from kw_lightning.nn import set_temperature
from kw_lightning.planning import plan


class Mixed(nn.Module):
    """Grouped, strided, rectangular and one-dimensional layers, and a linear one over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, (3, 1), padding=(1, 0))
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, stride=2, groups=3, padding=1)
        self.line = nn.Conv1d(18, 6, 3)
        self.line2 = nn.Conv1d(6, 6, 5, padding=2)
        self.tokens = nn.Linear(6, 12)
        self.tokens2 = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 1, height, width]."""
        x = self.grouped(self.depthwise(self.conv(x))).flatten(2)
        return self.tokens2(self.tokens(self.line2(self.line(x)).mT)).sum(1)


# Of each network, selectors that have no layer in common.
NETWORKS: list[tuple[type[nn.Module], list[Any]]] = [
    (TinyResNet, ["layer1.*", "layer2.*.conv?", "layer2.0.shortcut", "stem", "fc[1/2:]"]),
    (Mixed, ["conv", "depthwise", "grouped", "line*", "tokens[1/2:]", "tokens2"]),
]
SHARES = st.sampled_from([1, 1, "1/2", "1/3"])
BUDGETS = st.one_of(
    st.sampled_from([1, 2, 4, 1.5, 0.9, "1/2", "2/5", "1/4", "1/100"]),
    st.fixed_dictionaries({"cells": st.integers(1, 200)}),
    st.fixed_dictionaries({"parameters": st.integers(2000, 100_000)}),
)
CELL = st.fixed_dictionaries({"out": SHARES, "in": SHARES, "spatial": st.sampled_from(["split", "whole"])})
ATTENTION = st.fixed_dictionaries(
    {"reduction": st.sampled_from(["1/16", 1]), "norm": st.sampled_from(["batch", "layer"])},
    optional={"basis": st.sampled_from(["1/16", "1/2", 1])},
)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[type[nn.Module], dict[str, Any], Any]:
    """Draw a network, warehouses for it, and perhaps a budget for all of them; now and then nonsense."""
    network, selectors = draw(st.sampled_from(NETWORKS))
    chosen = draw(st.lists(st.sampled_from(selectors), min_size=1, unique=True))
    warehouses: dict[str, dict[str, Any]] = {}
    for index, selector in enumerate(chosen):
        name = draw(st.sampled_from(["shared", *[f"own{index}"] * 4]))
        settings = draw(st.fixed_dictionaries({}, optional={"budget": BUDGETS, "cell": CELL, "attention": ATTENTION}))
        warehouse = warehouses.setdefault(name, {"layers": [], **settings})
        warehouse["layers"].append(draw(st.sampled_from([*[selector] * 9, "*"])))
    overall = draw(st.none() | st.none() | st.fixed_dictionaries({"relative": st.sampled_from([1, 2])}))
    return network, warehouses, overall


@settings(max_examples=60)
@given(recipes())
def test_refused_or_built_as_planned(drawn: tuple[type[nn.Module], dict[str, Any], Any]) -> None:
    network, warehouses, overall = drawn
    torch.manual_seed(0)
    model = network().double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    y = model(x)
    others = {} if overall is None else {"model": {"backbone": "torchvision/resnet18", "budget": overall}}
    try:
        planned = plan(recipe(warehouses, **others), model, input_shape=[1, 8, 8])
    except RecipeError as refusal:
        event("refused")
        if not all(problem.path for problem in refusal.problems):
            raise
        return
    event("built")
    for warehouse in planned.warehouses:
        starts = [cell for layer in warehouse.layers for cell in layer.partition.initial_cells]
        own = [cell for cell in starts if cell < warehouse.partition.cells]
        assert len(own) == len(set(own))  # no two mixtures start as the same cell
        assert len(starts) == warehouse.partition.mixtures
        if warehouse.asked.parameters is not None:
            assert warehouse.cell_parameters + warehouse.attention_parameters <= warehouse.asked.parameters
    conversion = apply_plan(planned, model, warm_start=True)
    assert sum(p.numel() for p in model.parameters()) == planned.parameters.kw
    if all(warehouse.budget >= 1 for warehouse in planned.warehouses):
        assert set(conversion.errors.values()) == {0.0}
        assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)
    set_temperature(model, 0.5)
    assert torch.isfinite(model(x)).all()
    assert planned.macs is not None
    assert planned.macs.kw > 0
