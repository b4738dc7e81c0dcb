"""The published training of the fifteen published configurations, by name against its rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import RECORDED, our_key, recipe_name
from test_zoo import PARAMETERS
from torch import nn

from kw_lightning.builder import build
from kw_lightning.fit.groups import parameter_groups
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"


def network_of(name: str) -> tuple[Recipe, nn.Module]:
    recipe = load_recipe(f"{name}-imagenet")
    with torch.device("meta"):
        return recipe, build(recipe)


def spared(recipe: Recipe, network: nn.Module) -> set[str]:
    """Return the parameters without weight decay, of the two groups that there are."""
    decayed, undecayed = parameter_groups(recipe, network)
    assert decayed.keys() == {"params"}
    assert undecayed["weight_decay"] == 0
    names = {parameter: name for name, parameter in network.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(undecayed["params"])
    return {names[parameter] for parameter in undecayed["params"]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_biases_and_vectors_are_not_decayed(name: str) -> None:
    recipe, network = network_of(name)
    expected = {
        key
        for key, parameter in network.named_parameters()
        if parameter.dim() == 1 or key.endswith((".bias", ".basis_bias"))
    }
    assert spared(recipe, network) == expected
    assert any(key.endswith(".bias") for key in expected)
    assert any("basis_bias" in key for key in expected) == (name == "resnet50-kw-1d2x")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the recorded archives are not here")
@pytest.mark.parametrize("recorded", RECORDED)
def test_groups_are_those_of_the_published_shapes(recorded: str) -> None:
    published = json.loads((REFERENCE / f"{recorded}.json").read_text())
    layers = {layer["name"]: layer["warehouse"] for layer in published["layers"]}
    recipe, network = network_of(recipe_name(recorded))
    ours = {name for name, _ in network.named_parameters()}
    expected = {
        our_key(key, set(layers))
        for key, shape in published["state"].items()
        if not key.startswith("warehouse_manager.") and (len(shape) == 1 or key.endswith(".bias"))
    }
    assert spared(recipe, network) == expected & ours


@pytest.mark.parametrize("name", PARAMETERS)
def test_optimizer_schedule_and_images(name: str) -> None:
    recipe = load_recipe(f"{name}-imagenet")
    assert recipe.train is not None
    assert recipe.data is not None
    mobile = name.startswith("mobilenetv2")
    assert recipe.train.schedule.final_lr == 1e-6
    assert recipe.train.optimizer.args == ({"momentum": 0.9, "nesterov": True} if mobile else {})
    images = recipe.data.train
    assert images["interpolation"] == ("bilinear" if mobile else "bicubic")
    assert images.get("rand_augment") == (None if mobile else "rand-m9-mstd0.5-inc1")
    assert images.get("random_erasing") == (None if mobile else {"probability": 0.25, "mode": "pixel"})
    assert recipe.data.eval == {"resize": 256, "crop": "center", "size": 224}
