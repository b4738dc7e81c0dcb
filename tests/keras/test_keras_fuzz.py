"""Whatever stands in `model.layers` and `model.blocks`: a network or a RecipeError, and soon."""

from __future__ import annotations

import copy
import json
import time
from contextlib import suppress
from typing import Any

import keras_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kw_lightning.errors import RecipeError
from kw_lightning.keras import LAYERS, read_network
from kw_lightning.keras.importing import import_keras
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Document, Model, Recipe, Warehouse

NAMES = st.sampled_from(["a", "b", "c", "input", "0", "$p", "$q", "x.y", "", "forward", "backbone"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(-(10**15), 10**15), st.floats(), NAMES,
    st.sampled_from(["same", "valid", "relu", "softmax", "none", "w"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=5,
)
ARGUMENTS = sorted({name for kind in LAYERS.values() for name in kind.arguments()} | {"name", "inputs", "repeat", "p"})
KINDS = st.sampled_from([*LAYERS, "block", "other", "nothing"])
CALLS = st.one_of(
    KINDS,
    st.dictionaries(KINDS, st.dictionaries(st.sampled_from(ARGUMENTS), VALUES, max_size=4), min_size=1, max_size=1),
    VALUES,
)
LISTS = st.lists(CALLS, min_size=1, max_size=5)
BLOCKS = st.fixed_dictionaries({"layers": LISTS}, optional={"parameters": VALUES, "inputs": VALUES, "other": VALUES})


def recipe_of(layers: Any, blocks: Any, shape: tuple[int, ...]) -> Recipe:
    """Return a recipe as the loader would, without its checks."""
    document = Document({"model": {"layers": layers, "blocks": blocks}})
    return Recipe("fuzz", document, model=Model(layers=tuple(layers), blocks=blocks, input=shape),
                  warehouses=(Warehouse("w", ()),))  # fmt: skip


def read(recipe: Recipe) -> None:
    """Read a network and build it when it is right."""
    started = time.process_time()
    try:
        network = read_network(recipe)
    except RecipeError as error:
        complete = all(problem.message for problem in error.problems) and bool(error.problems)
    else:
        complete = len(network.summary()) > 1
    assert complete
    assert time.process_time() - started < 2


@given(LISTS, st.dictionaries(st.sampled_from(["block", "other", "Dense"]), st.one_of(BLOCKS, VALUES), max_size=2),
       st.lists(st.integers(1, 9), min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_data_is_read_or_refused(layers: list[Any], blocks: dict[str, Any], shape: list[int]) -> None:
    read(recipe_of(layers, blocks, tuple(shape)))


SHIPPED = [load_recipe(name) for name in ("digits-resnet", "keras-deit-tiny-kw-4x", "keras-convnext-tiny-kw-1x")]


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_shipped_networks_with_one_value_changed(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(SHIPPED)).model
    assert model is not None
    changed = {"layers": copy.deepcopy(list(model.layers)), "blocks": copy.deepcopy(dict(model.blocks))}
    _change(data, data.draw(st.sampled_from([part for part in changed.values() if part])))
    read(recipe_of(changed["layers"], changed["blocks"], model.input or (3, 8, 8)))


FILES = [json.loads(file.read_text()) for file in sorted(keras_models.DATA.glob("*.json"))]


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_imports_with_one_value_changed(data: st.DataObject) -> None:
    model = copy.deepcopy(data.draw(st.sampled_from(FILES)))
    _change(data, model)
    with suppress(RecipeError):
        read(load_recipe(import_keras(json.dumps(model))))


def _change(data: st.DataObject, value: Any) -> None:
    """Replace or take away one value, somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 9)):
            value = inner
            continue
        if data.draw(st.booleans()) and len(value) > 1:
            del value[key]
        else:
            value[key] = data.draw(VALUES)
        return
