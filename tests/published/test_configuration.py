"""The authors' configurations as recipes: the same plan as the shipped recipe of that configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kw_lightning.errors import RunError
from kw_lightning.planning import plan
from kw_lightning.planning.types import Plan
from kw_lightning.published.configuration import configuration_text, read_configuration, recipe_of
from kw_lightning.recipe import load_recipe


def of(model: str, budget: float, cell: float, sharing_range: Any = None, **others: Any) -> dict[str, Any]:
    ratios = {"cell_num_ratio": budget, "cell_inplane_ratio": cell, "cell_outplane_ratio": cell}
    return {"model": model, **ratios, **({"sharing_range": sharing_range} if sharing_range else {}), **others}


CONFIGURATIONS = {
    "resnet18-kw-1d4x": of("kw_resnet18", 0.25, 0.5, "layer_conv", reduction=0.0625),
    "resnet18-kw-1d2x": of("kw_resnet18", 0.5, 0.5, "layer_conv", reduction=0.0625),
    "resnet18-kw-1x": of("kw_resnet18", 1, 1, "layer_conv", reduction=0.0625, drop_path=0.1),
    "resnet18-kw-2x": of("kw_resnet18", 2, 1, "layer_conv", drop_path=0.1),
    "resnet18-kw-4x": of("kw_resnet18", 4, 1, ["layer", "conv"], drop_path=0.1),
    "resnet50-kw-1d2x": of("kw_resnet50", 0.5, 0.5, "layer_conv", nonlocal_basis_ratio=0.0625, drop_path=0.1),
    "resnet50-kw-1x": of("kw_resnet50", 1, 1, drop_path=0.1),
    "resnet50-kw-4x": of("kw_resnet50", 4, 1, drop_path=0.1),
    "mobilenetv2-050-kw-1x": of("kw_mobilenetv2_050", 1, 1, ["layer", "pwconv"], drop_path=0.0),
    "mobilenetv2-050-kw-4x": of("kw_mobilenetv2_050", 4, 1, ["layer"]),
    "mobilenetv2-050-kw-1d2x": {"model": "kw1d2x_mobilenetv2_050"},
    "mobilenetv2-100-kw-1x": of("kw_mobilenetv2_100", 1, 1, ["layer", "pwconv"]),
    "mobilenetv2-100-kw-4x": of("kw_mobilenetv2_100", 4, 1, ["layer"]),
    "mobilenetv2-100-kw-1d2x": {"model": "kw1d2x_mobilenetv2_100"},
    "convnext-tiny-kw-1x": of("kw_convnext_tiny", 1, 1, "layer_pwconv", drop_path=0.3, model_ema=True),
}


def layers(planned: Plan) -> dict[str, Any]:
    return {
        layer.name: (
            warehouse.partition.cells,
            warehouse.partition.cell_shape,
            layer.partition.first_cell,
            layer.attention_parameters,
        )
        for warehouse in planned.warehouses
        for layer in warehouse.layers
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_plans_what_the_shipped_recipe_plans(name: str) -> None:
    converted, shipped = plan(load_recipe(recipe_of(CONFIGURATIONS[name], name))), plan(load_recipe(name))
    assert layers(converted) == layers(shipped)
    assert converted.parameters == shipped.parameters


def test_text_of_a_recipe_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(configuration_text(recipe_of(CONFIGURATIONS["resnet50-kw-1d2x"], "mine")))
    assert layers(plan(load_recipe(file))) == layers(plan(load_recipe("resnet50-kw-1d2x")))


def test_a_list_gives_every_warehouse_its_own_number() -> None:
    recipe = recipe_of(of("kw_resnet18", 1, 1) | {"cell_num_ratio": [1, 2, 0.5, 4]}, "mine")
    assert [warehouse["budget"] for warehouse in recipe["warehouses"].values()] == [1, 2, "1/2", 4]


def test_keys_of_the_training_are_told(tmp_path: Path) -> None:
    file = tmp_path / "kw1x_resnet18.json"
    file.write_text(json.dumps(of("kw_resnet18", 1, 1, opt="sgd", epochs=150)))
    recipe, left = read_configuration(file)
    assert (recipe["name"], left) == ("kw1x-resnet18", ["epochs", "opt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a configuration in JSON"),
        ("[]", "found an empty list, allowed: a map with the key model"),
        ('{"model": "kw_resnet19"}', 'model: found "kw_resnet19", allowed: kw1d2x_mobilenetv2_050, '),
        (
            '{"model": "kw_resnet18", "reduction": [1, 2]}',
            "reduction: found a list of 2 values, allowed: a number above 0",
        ),
        ('{"model": "kw_mobilenetv2_100"}', "sharing_range: found nothing, allowed: a list of beginnings"),
    ],
)
def test_mistakes_are_one_message(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(RunError) as caught:
        read_configuration(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
