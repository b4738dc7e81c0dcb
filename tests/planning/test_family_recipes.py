"""The shipped recipes of the paper's ablations and of the methods before it: what they count, and what they compute."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kw_lightning import convert
from kw_lightning.nn import KWConv2d, set_temperature
from kw_lightning.planning import Plan, plan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.sources import names
from kw_lightning.resources import shipped

# Parameters of all, and of the attention. Published: 44.90M and 11.94M of ODConv, whose attention over positions of the
# kernel, 3,150 parameters, is not here; 11.93M of KernelWarehouse.
COUNTS = {
    "resnet18-dy-conv": (45_473_012, 310_988),
    "resnet18-cond-conv": (90_106_944, 314_904),
    "resnet18-od-conv-4x": (44_898_760, 252_832),
    "resnet18-od-conv-1x": (11_941_384, 251_872),
    "resnet18-kw-1x-by-layer": (11_805_134, 115_622),
    "resnet18-kw-1x-by-block": (11_860_538, 171_026),
    "resnet18-kw-1x-sizes-apart": (11_922_152, 232_640),
    "resnet18-kw-1x-unsplit": (11_778_464, 88_952),
    "resnet18-kw-1x-softmax": (11_928_707, 239_195),
    "resnet18-kw-1x-sigmoid": (11_928_707, 239_195),
    "resnet18-kw-1x-relu": (11_928_707, 239_195),
    "resnet18-kw-1x-no-start": (11_932_148, 242_636),
    "resnet18-kw-1d2x-shared-start": (7_431_044, 1_320_284),
    "resnet18-kw-1x-learnt": (11_697_972, 8_460),
}
WIDTHS = (64, 128, 256, 512)


@cache
def planned(name: str) -> Plan:
    return plan(load_recipe(name))


@pytest.mark.parametrize("name", COUNTS)
def test_a_recipe_has_the_parameters_that_the_page_says(name: str) -> None:
    found = planned(name)
    attention = sum(warehouse.attention_parameters for warehouse in found.warehouses)
    assert (found.parameters.kw, attention) == COUNTS[name]
    assert found.warning is None


def test_every_recipe_of_the_family_is_counted() -> None:
    folder = Path(str(shipped("recipes"))) / "family"
    assert {file.stem for file in folder.glob("*.yaml")} == set(COUNTS)
    assert set(COUNTS) <= set(names())


def convolutions(downsampling: bool) -> list[tuple[int, int, int]]:
    """Return (input channels, output channels, kernel size) of ResNet18's convolutions but the stem."""
    found = [(64, 64, 3)] * 4
    for before, width in pairwise(WIDTHS):
        found += [(before, width, 3), *[(width, width, 3)] * 3]
        found += [(before, width, 1)] * downsampling
    return found


@pytest.mark.parametrize(
    ("name", "kernels", "share", "gated"),
    [
        ("resnet18-dy-conv", 4, 4, False),
        ("resnet18-cond-conv", 8, 4, False),
        ("resnet18-od-conv-4x", 4, 16, True),
        ("resnet18-od-conv-1x", 1, 16, True),
    ],
)
def test_whole_kernels_count_as_their_papers_say(name: str, kernels: int, share: int, gated: bool) -> None:
    more = 0
    for inputs, outputs, size in convolutions(downsampling=not gated):
        hidden = max(inputs // share, 16)
        attention = inputs * hidden + 2 * hidden + (hidden + 1) * (kernels + (inputs + outputs) * gated)
        more += (kernels - 1) * inputs * outputs * size**2 + attention
    assert planned(name).parameters.kw == planned(name).parameters.static + more


def small(attention: dict[str, Any], **stages: Any) -> nn.Sequential:
    """Return two convolutions, the second made dynamic with whole kernels as cells."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, bias=False))
    given = {"sharing": "layer", "cell": {"spatial": "whole"}, "budget": {"cells": 4}, "attention": attention, **stages}
    converted = convert(network.double(), {"kw": 1, "model": {"input": [3, 6, 6]}, "stages": given})
    assert isinstance(converted, nn.Sequential)
    return converted.eval()


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_a_layer_of_whole_kernels_adds_up_their_convolutions(function: str) -> None:
    network = small({"function": function, "start": "none"})
    layer = network[1]
    assert isinstance(layer, KWConv2d)
    assert layer.warehouse is not None
    assert layer.warehouse.cells.shape == (4, 12, 8, 3, 3)
    set_temperature(network, 0.5)
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    alpha = layer.attend(x)
    expected = sum(
        alpha[:, 0, k, None, None, None] * F.conv2d(x, layer.warehouse.cells[k], padding=1) for k in range(4)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)
    assert (alpha >= 0).all()
    if function == "softmax":
        torch.testing.assert_close(alpha.sum(-1), torch.ones(3, 1, dtype=torch.float64))
