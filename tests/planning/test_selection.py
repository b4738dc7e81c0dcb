"""Selectors: which layers a name, glob or condition means, and what is said about those that mean none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from networks import TinyResNet, recipe
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from kw_lightning.errors import RecipeError
from kw_lightning.planning import plan
from kw_lightning.planning.network import survey


def selected(model: nn.Module, *selectors: Any) -> list[str]:
    """Return the names of the layers that selectors mean."""
    return [layer.name for layer in plan(recipe(selectors), model).warehouses[0].layers]


BLOCKS = ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (["layer1.0.conv1"], BLOCKS[:1]),
        (["layer1.*"], BLOCKS),
        (["layer1.*.conv?"], BLOCKS),
        (["layer1.[0].conv?"], BLOCKS[:2]),
        (["*.conv2"], ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "layer2.1.conv2"]),
        (["layer1.1.*", "layer1.0.conv1"], [BLOCKS[0], *BLOCKS[2:]]),  # the network's order, not the recipe's
        (["layer1.*", "layer1.0.conv1"], BLOCKS),  # twice the same is once
        ([{"name": "layer2.*", "kernel_size": 1}], ["layer2.0.shortcut"]),
        ([{"kernel_size": [3, 3], "min_channels": 16}], ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]),
        ([{"type": "Linear"}], ["fc"]),
        ([{"name": "layer1.*", "exclude": ["*.conv1"]}], ["layer1.0.conv2", "layer1.1.conv2"]),
    ],
)
def test_what_selectors_mean(selectors: list[Any], expected: list[str]) -> None:
    assert selected(TinyResNet(), *selectors) == expected


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "layer1.0.convl",
            'found the unknown name "layer1.0.convl", allowed: names and globs of layers of the network; did '
            'you mean "layer1',
        ),
        ("stage1.*", 'found the unmatched glob "stage1.*", allowed: names and globs of layers of the network'),
        ("layer1.0.bn1", '"layer1.0.bn1" is a BatchNorm2d, and no Conv1d, Conv2d, Conv3d or Linear'),
        (
            "layer1.0",
            '"layer1.0" is a Residual, and no Conv1d, Conv2d, Conv3d or Linear; "layer1.0.*" means the layers',
        ),
        ("*.bn?", '"*.bn?" matches 8 modules, and none is a Conv1d'),
        (
            {"name": "layer1.*", "kernel_size": 7},
            '"layer1.*" matches 4 layers: found Conv2d 3×3 8 → 8, allowed: kernel_size 7',
        ),
        ({"name": "layer1.*", "type": "Linear"}, "matches 4 layers: found Conv2d 3×3 8 → 8, allowed: type Linear"),
        (
            {"type": "Conv2D"},
            '.type: found the unknown type "Conv2D", allowed: Conv1d, Conv2d, Conv3d, Linear; did you mean "Conv2d"?',
        ),
        ({"min_channels": 99}, "→ 16, allowed: at least 99 input and output channels"),
        (
            {"name": "layer1.*", "exclude": ["layer3.*"]},
            'exclude[0]: found the unmatched glob "layer3.*", allowed: names and globs of layers of '
            '"layer1.*"; did you mean',
        ),
        ({"name": "layer1.*", "exclude": ["*"]}, 'all 4 layers that "layer1.*" matches are excluded'),
        (
            "fc[1/3:]",
            'found the channels 3.33333 to 10, which are [1/3:1] of "fc", allowed: whole ones of its 10 '
            "output channels",
        ),
    ],
)
def test_selectors_that_mean_nothing(selector: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        selected(TinyResNet(), selector)
    assert message in str(caught.value)
    assert str(caught.value).startswith("warehouses.a.layers[0]")


class Around(nn.Module):
    """A network inside another one, as a LightningModule has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.model = TinyResNet()


def test_a_network_that_fabric_has_wrapped_is_told() -> None:
    wrapped = Fabric(accelerator="cpu", devices=1).setup(TinyResNet())
    with pytest.raises(RecipeError) as caught:
        plan(recipe(["layer1.*.conv?"]), wrapped)
    assert str(caught.value) == (
        'warehouses.a.layers[0]: found the names of layers of "_forward_module", allowed: a network before Fabric\'s '
        "setup; convert it there, before its optimizer is made"
    )


def test_names_of_a_submodule_are_one_problem() -> None:
    inner = recipe(
        {"a": ["stem", "layer1.*.conv?"], "b": {"layers": [{"name": "layer2.*", "exclude": ["*.shortcut"]}]}}
    )
    plan(inner, TinyResNet())
    with pytest.raises(RecipeError) as caught:
        plan(inner, Around())
    assert str(caught.value) == (
        'warehouses.a.layers[0]: found the names of layers of "model", allowed: those of the whole network, as '
        '"model.stem"; or convert that part alone, as KWCallback(…, module="model") does'
    )
    with pytest.raises(RecipeError, match=r"the unknown name .stem.*\n.*the unknown name .head."):
        plan(recipe(["stem", "head"]), Around())


def test_all_problems_come_at_once() -> None:
    asked = recipe(
        {
            "a": ["layer1.*", "nothing"],
            "b": ["layer1.0.conv1", "layer2.0.bn1"],
            "c": {"layers": ["layer2.*"], "cell": {"spatial": "whole"}},
            "d": {"layers": ["stem", "fc"]},
        }
    )
    with pytest.raises(RecipeError) as caught:
        plan(asked, TinyResNet())
    messages = [str(problem) for problem in caught.value.problems]
    assert len(messages) == 5
    assert 'found the unknown name "nothing", allowed: ' in messages[0]
    assert 'layer "layer1.0.conv1" is in warehouse "a" already; a layer draws on one warehouse' in messages[1]
    assert '"layer2.0.bn1" is a BatchNorm2d' in messages[2]
    assert "unsplit cells need kernels of one size: found 1×1, 3×3" in messages[3]
    assert "layer2.0.shortcut [16×8×1×1]" in messages[3]
    assert "0-dimensional and 2-dimensional" in messages[4]
    assert "fc [10×16]" in messages[4]


def test_a_cell_that_does_not_divide() -> None:
    asked = recipe({"a": {"layers": ["stem"], "cell": {"out": "3/8"}}})
    with pytest.raises(RecipeError, match=r"a cell of 3 output channels .* does not divide 8"):
        plan(asked, TinyResNet())


class _Scaled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class _Named(nn.Conv2d):
    """A subclass that leaves the forward pass alone."""


def test_subclasses_are_chosen_unless_their_forward_pass_is_their_own() -> None:
    model = nn.Sequential(_Scaled(4, 4, 1), _Named(4, 4, 1), nn.Conv2d(4, 4, 1))
    assert selected(model, "*") == ["1", "2"]
    with pytest.raises(RecipeError, match='"0" cannot be made dynamic: _Scaled is a Conv2d with a forward pass'):
        selected(model, "0")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LazyConv2d(4, 1), "has no shape before its first input"),
        (weight_norm(nn.Conv2d(4, 4, 1)), "parametrized weight"),
        (nn.MultiheadAttention(4, 1), "nn.MultiheadAttention reads its weight directly"),
        (nn.Linear(4, 0), "no weight of floating-point numbers"),
    ],
)
def test_layers_that_cannot_be_dynamic(layer: nn.Module, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        selected(nn.Sequential(layer), "0*")


def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(RecipeError, match='"0" cannot be made dynamic: shares its weight with "1"'):
        selected(model, "0")


def test_one_module_at_two_names_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert survey(model).layers[0].names == ("0", "2")
    assert selected(model, "2") == ["0"]
    with pytest.raises(RecipeError, match='layer "0" is in warehouse "a" already'):
        plan(recipe({"a": ["0"], "b": ["2"]}), model)


def test_slices_of_a_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 12))
    planned = plan(recipe({"a": ["0[2/3:]", "1"], "b": ["0[:1/3]"]}), model)
    assert [layer.name for layer in planned.warehouses[0].layers] == ["0[8:12]", "1"]
    assert [layer.rows for layer in planned.warehouses[1].layers] == [(0, 4)]
    with pytest.raises(RecipeError, match=r'layer "0\[0:8\]" is in warehouse "a" already'):
        plan(recipe({"a": ["0[1/3:]"], "b": ["0[:2/3]"]}), model)
    with pytest.raises(RecipeError, match="has 2 groups; only a layer of one can be cut"):
        selected(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0[:1/2]")
    assert selected(model, "0[0:1]") == ["0"]


def test_many_wrong_names_take_no_time() -> None:
    wrong = [f"layer{index}.conv" for index in range(100, 1100)]
    with pytest.raises(RecipeError) as caught:
        plan(recipe(wrong[:1000]), TinyResNet())
    assert len(caught.value.problems) == 1000
