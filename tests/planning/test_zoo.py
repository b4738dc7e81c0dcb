"""The shipped zoo against the published configurations: counts, cells and first cells to the last digit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from published import PUBLISHED, RECORDED, our_name, recipe_name

from kw_lightning.planning import Plan, plan
from kw_lightning.recipe import load_recipe

# Parameters, and in millions as published (ResNet18 at 1/4 as its configuration file builds it).
PARAMETERS = {
    "resnet18-kw-1d4x": (4_031_768, 4.03),
    "resnet18-kw-1d2x": (7_431_044, 7.43),
    "resnet18-kw-1x": (11_932_148, 11.93),
    "resnet18-kw-2x": (23_242_127, 23.24),
    "resnet18-kw-4x": (45_862_085, 45.86),
    "resnet50-kw-1d2x": (17_638_264, 17.64),
    "resnet50-kw-1x": (28_052_310, 28.05),
    "resnet50-kw-4x": (102_015_144, 102.02),
    "mobilenetv2-100-kw-1d2x": (2_654_396, 2.65),
    "mobilenetv2-100-kw-1x": (5_168_146, 5.17),
    "mobilenetv2-100-kw-4x": (11_379_382, 11.38),
    "mobilenetv2-050-kw-1d2x": (1_466_888, 1.47),
    "mobilenetv2-050-kw-1x": (2_854_522, 2.85),
    "mobilenetv2-050-kw-4x": (4_648_587, 4.65),
    "convnext-tiny-kw-1x": (39_370_674, 39.37),
}


@functools.cache
def shipped_plan(name: str) -> Plan:
    """Return the plan of a shipped recipe."""
    return plan(load_recipe(name))


@pytest.mark.parametrize("recorded", RECORDED)
def test_a_recipe_plans_the_recorded_configuration_of_the_authors(recorded: str) -> None:
    published: dict[str, Any] = json.loads((PUBLISHED / f"{recorded}.json").read_text())
    planned = shipped_plan(recipe_name(recorded))
    assert planned.parameters.kw == published["parameters"]
    linear = {our_name(layer["name"]) for layer in published["layers"]} & linear_layers(planned)
    expected = {}
    for layer in published["layers"]:
        warehouse = published["warehouses"][layer["warehouse"]]
        name = our_name(layer["name"])
        shape = tuple(warehouse["cell_shape"])
        # 1×1 convolutions of the published network that are linear layers here
        shape = shape[:2] if name in linear else shape
        expected[name] = (warehouse["cells"], shape, layer["mixtures"], layer["first_cell"])
    found = {
        layer.name: (
            warehouse.partition.cells,
            warehouse.partition.cell_shape,
            layer.partition.mixtures,
            layer.partition.first_cell,
        )
        for warehouse in planned.warehouses
        for layer in warehouse.layers
    }
    assert found == expected
    groups: list[list[str]] = [[] for _ in published["warehouses"]]
    for layer in published["layers"]:
        groups[layer["warehouse"]].append(our_name(layer["name"]))
    assert sorted([layer.name for layer in warehouse.layers] for warehouse in planned.warehouses) == sorted(groups)


def linear_layers(planned: Plan) -> set[str]:
    """Return the names of the planned linear layers."""
    return {layer.name for w in planned.warehouses for layer in w.layers if layer.layer.type == "Linear"}


def test_recorded_configurations_are_there() -> None:
    assert len(RECORDED) == 9


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_the_published_number_of_parameters(name: str) -> None:
    exact, published = PARAMETERS[name]
    planned = shipped_plan(name)
    assert planned.parameters.kw == exact
    assert round(exact / 1e6, 2) == published
    assert planned.macs is not None


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_can_be_extended_without_its_training(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model is not None
    assert recipe.document.data.keys() == {
        "kw",
        "name",
        "description",
        "model",
        "defaults",
        "warehouses",
        "temperature",
    }
    assert recipe.document.data["temperature"] == {"end": 0}  # the training says how long


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_is_that_of_the_network_with_the_training_of_all(name: str) -> None:
    trained, network = load_recipe(f"{name}-imagenet"), load_recipe(name)
    for key in ("model", "defaults", "warehouses"):
        assert trained.document.data[key] == network.document.data[key]
    sources = [Path(source.file).name for source in trained.document.sources]
    assert {"imagenet-adamw-300.yaml", "imagenet-sgd-150.yaml"} & set(sources)


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_is_set_as_published(name: str) -> None:
    recipe = load_recipe(f"{name}-imagenet")
    train = recipe.train
    assert train is not None
    assert recipe.data is not None
    assert recipe.model is not None
    assert (recipe.data.train["mean"], recipe.data.train["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    batch = recipe.data.batch_size * train.accumulate
    found = (train.epochs, batch, train.optimizer.name, train.optimizer.lr, recipe.temperature.epochs)
    if name.startswith("mobilenetv2"):
        assert found == (150, 256, "SGD", 0.05, 15)
        assert train.optimizer.weight_decay == 4e-5
        assert train.optimizer.args["momentum"] == 0.9
        assert recipe.model.args["dropout"] == (0.1 if name.endswith("1d2x") else 0)
        assert (train.mixup, train.cutmix, train.label_smoothing) == (0, 0, 0)
        return
    assert found == (300, 4096, "AdamW", 4e-3, 20)
    assert train.optimizer.weight_decay == 0.05
    assert train.schedule.warmup_epochs == 20
    assert (train.mixup, train.cutmix) == ((0, 0) if name == "resnet18-kw-1d4x" else (0.8, 1.0))
    depth = 0.3 if name.startswith("convnext") else 0 if name in ("resnet18-kw-1d4x", "resnet18-kw-1d2x") else 0.1
    assert recipe.model.args["stochastic_depth_prob"] == depth
    assert (train.ema is not None) == name.startswith("convnext")
