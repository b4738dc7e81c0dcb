"""Weight decay, learning rates of layers, and what is frozen, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kw_lightning import load_recipe
from kw_lightning.builder import build
from kw_lightning.errors import RecipeError
from kw_lightning.fit.groups import freeze, parameter_groups
from kw_lightning.recipe.types import Recipe


def recipe_with(**train: Any) -> Recipe:
    return load_recipe({"kw": 1, "extends": "digits-resnet", "train": train})


def named(network: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], set[str]]]:
    """Return each group's settings with the names of its parameters; every parameter is in one group."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    return [
        ({key: value for key, value in group.items() if key != "params"}, {names[p] for p in group["params"]})
        for group in groups
    ]


@pytest.fixture
def network() -> nn.Module:
    with torch.device("meta"):
        return build(load_recipe("digits-resnet"))


def test_all_parameters_are_one_group_unless_asked(network: nn.Module) -> None:
    (group,) = parameter_groups(recipe_with(optimizer={"weight_decay": 0.1}), network)
    assert group.keys() == {"params"}
    assert len(group["params"]) == len(list(network.parameters()))


def test_vectors_are_not_decayed(network: nn.Module) -> None:
    (decayed, spared) = named(network, parameter_groups(recipe_with(optimizer={"no_decay": "vectors"}), network))
    assert (decayed[0], spared[0]) == ({}, {"weight_decay": 0.0})
    assert {"stem.weight", "classifier.weight", "stage1.conv1.warehouse.cells"} <= decayed[1]
    assert {"stage1.conv1.attention.reduce.weight", "stage1.conv1.attention.expand.weight"} <= decayed[1]
    assert {
        "classifier.bias",
        "stage1.main.weight",
        "stage1.main.bias",
        "stage1.conv1.attention.expand.bias",
    } <= spared[1]


def test_low_rank_bias_counts_as_a_bias(network: nn.Module) -> None:
    recipe = load_recipe(
        {"kw": 1, "extends": "digits-resnet", "defaults": {"attention": {"basis": 0.5}}},
        ["train.optimizer.no_decay=vectors"],
    )
    with torch.device("meta"):
        network = build(recipe)
    decayed, spared = (names for _, names in named(network, parameter_groups(recipe, network)))
    assert network.get_parameter("stage1.conv1.attention.basis_bias").dim() == 2
    assert "stage1.conv1.attention.basis_bias" in spared
    assert "stage1.conv1.attention.basis.weight" in decayed


def test_named_parameters_are_not_decayed_either(network: nn.Module) -> None:
    recipe = recipe_with(optimizer={"no_decay": ["classifier", "stage1.*.cells"]})
    decayed, spared = (names for _, names in named(network, parameter_groups(recipe, network)))
    assert {"classifier.weight", "classifier.bias", "stage1.conv1.warehouse.cells"} <= spared
    assert "stage2.conv1.warehouse.cells" in decayed


def test_groups_are_the_same_whatever_the_weight_decay(network: nn.Module) -> None:
    without, with_decay = (
        named(network, parameter_groups(recipe_with(optimizer={"weight_decay": value, "no_decay": "vectors"}), network))
        for value in (0, 0.1)
    )
    assert [names for _, names in without] == [names for _, names in with_decay]


def test_layers_have_a_learning_rate_of_their_own(network: nn.Module) -> None:
    groups = [{"layers": "stem", "lr": 0.5}, {"layers": ["stage1", "stem"], "lr": "0.25x"}]
    recipe = recipe_with(optimizer={"lr": 0.8, "no_decay": "vectors", "groups": groups})
    found = named(network, parameter_groups(recipe, network))
    assert [settings for settings, _ in found] == [
        {},
        {"weight_decay": 0.0},
        {"lr": 0.5},  # the stem has no bias; the first group that means it has it
        {"lr": 0.2},
        {"lr": 0.2, "weight_decay": 0.0},
    ]
    assert found[2][1] == {"stem.weight"}
    assert "stage1.conv1.warehouse.cells" in found[3][1]
    assert all(name.startswith("stage1.") for name in found[3][1] | found[4][1])


def test_shared_cells_go_with_the_layers_only_if_all_are_meant(network: nn.Module) -> None:
    recipe = recipe_with(optimizer={"groups": [{"layers": "stage1.conv1", "lr": "0.1x"}]})
    rest, slower = (names for _, names in named(network, parameter_groups(recipe, network)))
    assert "stage1.conv1.warehouse.cells" in rest
    assert "stage1.conv1.attention.expand.weight" in slower


def test_frozen_layers_are_left_out_with_the_warehouse_of_frozen_ones_only(network: nn.Module) -> None:
    recipe = recipe_with(freeze=["stem", "stage1", "stage2.conv1"])
    freeze(recipe, network)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert {"stem.weight", "stage1.conv1.warehouse.cells", "stage2.conv1.attention.reduce.weight"} <= frozen
    assert "stage2.conv1.warehouse.cells" not in frozen
    ((_, trained),) = named(network, parameter_groups(recipe, network))
    assert trained == {name for name, _ in network.named_parameters()} - frozen


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"optimizer": {"groups": [{"layers": ["stage1", "stag2"], "lr": 1}]}},
            r'train\.optimizer\.groups\[0\]\.layers\[1\]: found "stag2", .*did you mean "stage2"\?',
        ),
        (
            {"optimizer": {"no_decay": ["*.gamma"]}},
            r'train\.optimizer\.no_decay\[0\]: found "\*\.gamma", allowed: names',
        ),
        ({"freeze": ["*"]}, r"train\.freeze: every layer is frozen, so nothing is left to train"),
    ],
)
def test_mistakes_are_placed(train: dict[str, Any], message: str, network: nn.Module) -> None:
    recipe = recipe_with(**train)

    def group() -> None:
        freeze(recipe, network)
        parameter_groups(recipe, network)

    with pytest.raises(RecipeError, match=message):
        group()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"freeze_epochs": 2}, "train.freeze_epochs: found freeze_epochs without freeze, allowed: train.freeze with"),
        (
            {"optimizer": {"groups": [{"layers": "a", "lr": "x0.1"}]}},
            'groups[0].lr: found "x0.1", allowed: a number of at least 0 or a number of times such as 0.1x',
        ),
        ({"optimizer": {"groups": [{"layers": "a"}]}}, 'train.optimizer.groups[0]: the key "lr" is missing'),
    ],
)
def test_mistakes_of_the_language(train: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipe_with(**train)
    assert message in str(raised.value)
