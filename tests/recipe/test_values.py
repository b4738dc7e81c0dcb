"""Numbers, fractions, sizes, `vars`, overrides, and the typed recipe that comes of them."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.checks import split_slice
from kw_lightning.recipe.scalars import read_plain, read_ratio, read_size
from kw_lightning.recipe.types import Average, Budget, Recipe, Selector
from kw_lightning.recipe.variables import escape

HALF = {"kw": 1, "warehouses": {"a": {"layers": ["x", "y"], "budget": "1/2"}}, "train": {"epochs": 3}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("4.0e-3", 4e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("1_000_000", 1_000_000),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1/4", "1/4"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("-", "-"),
        ("9" * 500, "9" * 500),
    ],
)
def test_plain_scalars_read_as_people_mean_them(text: str, value: object) -> None:
    read = read_plain(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["9" * 19, "-" + "9" * 100, "1e999", ".inf", "-.INF", ".nan"])
def test_numbers_that_cannot_be_used_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|digits|too large"):
        read_plain(text)


def test_ratios_are_exact_and_sizes_have_units() -> None:
    assert read_ratio("1/4") == Fraction(1, 4)
    assert read_ratio(0.1) == Fraction(1, 10)
    assert read_ratio(1e-3) == Fraction(1, 1000)
    assert [read_size(value) for value in (5, 5.0, "7.5M", "3K", "1 G")] == [5, 5, 7_500_000, 3000, 10**9]
    for value in (True, None, "1/0", "1 / 4", "-1/4", "1/" + "9" * 20):
        with pytest.raises(ValueError, match=r"."):
            read_ratio(value)
    for value in (True, 1.5, "M", "1m", "-1M"):
        with pytest.raises(ValueError, match="no size"):
            read_size(value)


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("layer1.*", "layer1.*", None),
        ("conv[12]", "conv[12]", None),
        ("blocks.*.attn.qkv[2/3:]", "blocks.*.attn.qkv", (Fraction(2, 3), Fraction(1))),
        ("qkv[:1/3]", "qkv", (Fraction(0), Fraction(1, 3))),
        ("qkv[0.25: 0.5]", "qkv", (Fraction(1, 4), Fraction(1, 2))),
        ("conv[12].fc[1/2:]", "conv[12].fc", (Fraction(1, 2), Fraction(1))),
        ("qkv[:]", "qkv", (Fraction(0), Fraction(1))),
    ],
)
def test_slice_behind_a_selector(text: str, name: str, part: tuple[Fraction, Fraction] | None) -> None:
    assert split_slice(text) == (name, part)


def test_everything_of_the_language_reaches_the_typed_recipe() -> None:
    recipe = load_recipe(
        {
            "kw": 1,
            "name": "all",
            "description": "Everything.",
            "model": {
                "backbone": "torchvision/resnet18",
                "args": {"num_classes": 10, "norm_layer": None},
                "pretrained": "DEFAULT",
                "input": [3, 64, 64],
                "budget": {"parameters": "11.7M"},
            },
            "engine": "autotune",
            "epilogue": False,
            "defaults": {"budget": 2, "cell": {"out": 0.5}, "attention": {"norm": "layer", "basis": "1/8"}},
            "warehouses": {
                "a": {"layers": ["x", {"type": "Conv2d", "kernel_size": 3, "min_channels": 16, "exclude": ["x.y"]}]},
                "b": {
                    "layers": [{"name": "q[1/2:]", "kernel_size": [3, 1]}],
                    "budget": {"parameters": "7.5M"},
                    "cell": {"in": "1/2", "spatial": "whole"},
                    "attention": {"basis": "none"},
                },
            },
            "stages": {"handover": False, "exclude": ["stem"], "budget": {"cells": 8}},
            "temperature": {"start": 0.9, "end": 0.1, "steps": 10, "shape": "cosine"},
            "data": {"name": "digits", "train": {"flip": True}},
            "train": {
                "optimizer": {"name": "SGD", "lr": 1, "momentum": 0.9, "args": {"foreach": True}},
                "schedule": {"name": "step", "args": {"gamma": 0.1}},
                "ema": {"decay": 0.99},
                "gradient_clip": 1,
            },
            "log": {"attention": {"every_n_epochs": 2, "figures": True}, "tensorboard": False},
        }
    )
    first, second = recipe.warehouses
    assert recipe.model is not None
    assert recipe.model.args == {"num_classes": 10, "norm_layer": None}
    assert recipe.model.input == (3, 64, 64)
    assert recipe.model.budget == Budget(parameters=11_700_000)
    assert first.layers[1] == Selector("*", "Conv2d", (3,), 16, ("x.y",), None, "warehouses.a.layers[1]")
    assert (first.cell.out, first.cell.in_, first.attention.basis) == (Fraction(1, 2), 1, Fraction(1, 8))
    assert second.layers[0].part == (Fraction(1, 2), 1)
    assert second.layers[0].kernel_size == (3, 1)
    assert second.budget == Budget(parameters=7_500_000)
    assert (second.cell.out, second.cell.in_, second.cell.spatial) == (Fraction(1, 2), Fraction(1, 2), "whole")
    assert (second.attention.norm, second.attention.basis) == ("layer", None)
    assert recipe.stages is not None
    assert (recipe.stages.handover, recipe.stages.exclude) == (False, ("stem",))
    assert recipe.stages.budget == Budget(cells=8)
    assert recipe.temperature.steps == 10
    assert recipe.data is not None
    assert recipe.data.train == {"flip": True}
    assert recipe.train is not None
    assert recipe.train.optimizer.args == {"momentum": 0.9, "foreach": True}
    assert recipe.train.ema == Average(decay=0.99)
    assert recipe.train.gradient_clip == 1.0
    assert (recipe.log.attention_every_n_epochs, recipe.log.attention_figures, recipe.log.tensorboard) == (
        2,
        True,
        False,
    )


def test_recipe_is_frozen_and_the_given_mapping_is_left_alone() -> None:
    given: dict[str, Any] = {"kw": 1, "warehouses": {"a": {"layers": ["x"]}}}
    recipe = load_recipe(given, ["warehouses.a.budget=2"])
    assert given == {"kw": 1, "warehouses": {"a": {"layers": ["x"]}}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("number", "found"),
    [(math.nan, "NaN, allowed: a finite number"), (-math.inf, "-Infinity, allowed"), (10**5000, "a longer number")],
    ids=["nan", "infinity", "long"],
)
def test_numbers_that_no_file_can_hold_are_refused_in_a_mapping(number: float, found: str) -> None:
    with pytest.raises(RecipeError, match=rf"^model\.args\.a\[0\]: found {found}"):
        load_recipe({"kw": 1, "model": {"args": {"a": [number]}}})


def test_numbers_of_numpy_are_plain_ones() -> None:
    recipe = load_recipe({"kw": 1, "model": {"args": {"a": np.float64(0.5)}}})
    assert recipe.model is not None
    assert type(recipe.model.args["a"]) is float


def test_keys_without_a_value_are_not_there() -> None:
    recipe = load_recipe({"kw": 1, "train": None, "temperature": {"epochs": None}, "warehouses": None})
    assert recipe == dataclasses.replace(Recipe(name="recipe", document=recipe.document))
    block = {"parameters": {"filters": None}, "layers": ["ReLU"]}
    assert load_recipe({"kw": 1, "model": {"blocks": {"b": block}}}).model.blocks == {"b": block}  # type: ignore[union-attr]


def test_whole_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("kw: 1\ntrain: {max_steps: 1e5, epochs: 3.0}\nmodel: {input: [3.0, 2.24e2]}\n")
    recipe = load_recipe(file)
    assert recipe.train is not None
    assert recipe.model is not None
    assert (recipe.train.max_steps, recipe.train.epochs, recipe.model.input) == (100_000, 3, (3, 224))
    assert isinstance(recipe.document.data["train"]["epochs"], int)


class TestVariables:
    def load(self, **data: Any) -> Any:
        return load_recipe({"kw": 1, **data}).document.data

    def test_alone_has_its_type_and_inside_a_text_is_written(self) -> None:
        data = self.load(
            vars={"n": 3, "half": "1/2", "layers": ["x", "y"], "on": True},
            name="net-${n}-${on}",
            train={"epochs": "${n}", "deterministic": "${on}"},
            warehouses={"a": {"layers": "${layers}", "budget": "${half}"}, "b": {"layers": ["block${n}.*"]}},
        )
        assert data["name"] == "net-3-true"
        assert data["train"] == {"epochs": 3, "deterministic": True}
        assert data["warehouses"] == {"a": {"layers": ["x", "y"], "budget": "1/2"}, "b": {"layers": ["block3.*"]}}
        assert "vars" not in data

    def test_dollar_dollar_writes_itself_and_a_single_dollar_is_none(self) -> None:
        assert self.load(vars={"n": 3}, description="$${n} $n $")["description"] == "${n} $n $"

    def test_escaped_text_means_itself(self) -> None:
        for text in ("${", "${a}", "$${a}", "${a}${", "${${a}}", "$", "${}"):
            assert self.load(description=escape(text))["description"] == text

    def test_place_is_where_the_value_stands(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text("kw: 1\nvars:\n  n: three\ntrain:\n  epochs: ${n}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(file)
        assert str(caught.value).startswith(f'{file}:3:6: train.epochs: found "three"')

    def test_override_changes_them(self) -> None:
        recipe = load_recipe({"kw": 1, "vars": {"n": 3}, "train": {"epochs": "${n}"}}, ["vars.n=5"])
        assert recipe.train is not None
        assert recipe.train.epochs == 5


class TestOverrides:
    def test_values_are_typed_by_the_schema(self) -> None:
        recipe = load_recipe(
            HALF,
            ["train.epochs=5", "train.optimizer.lr=1e-3", "warehouses.a.budget=1/4", "name=007", "train.compile=true"],
        )
        assert recipe.name == "007"
        assert recipe.train is not None
        assert (recipe.train.epochs, recipe.train.optimizer.lr, recipe.train.compile) == (5, 1e-3, True)
        assert recipe.warehouses[0].budget.ratio == Fraction(1, 4)

    def test_lists_and_maps_are_read_as_yaml_and_the_first_equals_sign_splits(self) -> None:
        recipe = load_recipe(
            HALF,
            [
                "warehouses.b={layers: [z], budget: {cells: 4}}",
                "description=a=b",
                "warehouses.a.layers[1]=w",
                "model.input=[1, 8, 8]",
            ],
        )
        assert recipe.warehouses[1].budget.cells == 4
        assert recipe.description == "a=b"
        assert [selector.name for selector in recipe.warehouses[0].layers] == ["x", "w"]
        assert recipe.model is not None
        assert recipe.model.input == (1, 8, 8)

    def test_plus_appends_null_removes_and_later_ones_win(self) -> None:
        recipe = load_recipe(
            HALF, ["warehouses.a.layers+=z", "warehouses.a.layers+=[v, w]", "train=null", "name=one", "name=two"]
        )
        assert [selector.name for selector in recipe.warehouses[0].layers] == ["x", "y", "z", "v", "w"]
        assert recipe.train is None
        assert recipe.name == "two"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train.epochs=ten", '<command line>:2:14: train.epochs: found "ten", allowed: a whole number'),
            ("train.epoch=1", '<command line>:2:1: train.epoch: found the unknown key "epoch"'),
            ("train.epochs", '<command line>:2:1: found "train.epochs", allowed: key=value'),
            ("=1", '<command line>:2:1: found "=1", allowed: key=value'),
            ("a..b=1", '<command line>:2:1: found the key "a..b", allowed: keys as train.epochs or model.input[0]'),
            ("a.=1", 'found the key "a.", allowed: keys as train.epochs or model.input[0]'),
            (".a=1", 'found the key ".a", allowed: keys as train.epochs or model.input[0]'),
            ("[0]=1", 'found the key "[0]", allowed: keys as train.epochs or model.input[0]'),
            ("a[x]=1", 'found the key "a[x]", allowed: keys as train.epochs or model.input[0]'),
            ("+=1", 'found the key "", allowed: keys as train.epochs or model.input[0]'),
            (
                "warehouses.a.layers[2]=z",
                "warehouses.a.layers[2]: there is no value 2 to change: found a list of 2 values",
            ),
            ("train[0]=z", "train[0]: there is no value 0 to change: found a map with epochs"),
            ("train.epochs.x=z", '"train.epochs" is no map, and has no key "x"'),
            ("train.epochs=[1", "<command line>:2:14: train.epochs: not YAML"),
            ("train.epochs=!!python/name:os.system", 'train.epochs: found the tag "!!python/name:os.system"'),
            ("extends=other.yaml", "extends can be changed in a file only"),
            ("kw=2", "kw can be changed in a file only"),
        ],
    )
    def test_mistakes_are_placed_on_the_command_line(self, text: str, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            load_recipe(HALF, ["name=x", text])
        assert message in str(caught.value)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("override", ["train.epochs=", "data.batch_size= ", "train.epochs=  # none"])
def test_an_override_without_a_value_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=r"found no value, allowed: a value; null removes the key") as caught:
        load_recipe("digits-resnet", [override])
    (problem,) = caught.value.problems
    assert problem.path == override.partition("=")[0]
    assert load_recipe("digits-resnet", ["train.epochs=null"]).train.epochs == 1  # type: ignore[union-attr]
    assert load_recipe("digits-resnet", ['description=""']).description == ""


@pytest.mark.parametrize("overrides", ["train.epochs=2", {"train.epochs": 2}, [("train.epochs", 2)]])
def test_overrides_that_are_no_list_of_texts_are_one_mistake(overrides: Any) -> None:
    with pytest.raises(RecipeError, match=r'allowed: a list of changes, as \["train\.epochs=5"\]$') as caught:
        load_recipe(HALF, overrides)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("source", "found"), [(None, "an object of NoneType"), ([HALF], "an object of list")])
def test_what_is_no_recipe_is_refused(source: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"^found {found} in the place of the recipe, allowed: a path, the name of"):
        load_recipe(source)
