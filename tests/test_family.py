"""What the paper varied, as keys of a recipe: from the text to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kw_lightning import convert
from kw_lightning.nn import KWConv2d


def made(attention: dict[str, Any] | None = None, **warehouse: Any) -> nn.Sequential:
    """Return a small network whose two convolutions share a warehouse, as a recipe says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    given = {"layers": ["0", "2"], "attention": attention or {}, **warehouse}
    converted = convert(model, {"kw": 1, "name": "family", "warehouses": {"a": given}})
    assert isinstance(converted, nn.Sequential)
    return converted


def first(network: nn.Sequential) -> KWConv2d:
    layer = network[0]
    assert isinstance(layer, KWConv2d)
    return layer


def test_a_recipe_says_what_mixtures_start_as() -> None:
    own, shared, none = (first(made({"start": start}, budget="1/2")) for start in ("own", "shared", "none"))
    assert own.partition is not None
    assert shared.partition is not None
    assert shared.attention is not None
    assert none.attention is not None
    assert own.partition.cells in own.partition.initial_cells
    assert own.partition.cells not in shared.partition.initial_cells
    assert shared.attention.annealed
    assert not none.attention.annealed
