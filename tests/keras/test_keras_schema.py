"""Editors complete layers: the language's schema has the vocabulary, and refuses nothing of it."""

from __future__ import annotations

from kw_lightning.keras import LAYERS
from kw_lightning.keras.layer import SHARED_ARGUMENTS
from kw_lightning.keras.schema import layer_schema, updated
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.schema import at, schema, schema_text


def test_schema_is_current() -> None:
    assert updated(schema_text()) == schema_text(), "run: python -m kw_lightning.keras.schema"
    assert schema()["$defs"]["layer"] == layer_schema()
    assert updated(schema_text().replace("number at least 0.", "thing.")) == schema_text()


def test_every_layer_and_argument_is_there() -> None:
    for name, kind in LAYERS.items():
        part = at(("model", "layers", 0, name))
        assert part is not None
        assert set(part["properties"]) == {*kind.arguments(), *SHARED_ARGUMENTS}
    strides = at(("model", "layers", 0, "Conv2D", "strides"))
    assert strides == {
        "description": "A whole number from 1 to 100,000, or 2 of them in a list.",
        "default": 1,
    }


def test_blocks_references_and_nothings_pass() -> None:
    layers = [{"ReLU": None}, {"own": {"units": None}}, {"Dense": {"units": "$units"}}, {"Dense": {"units": "wrong"}}]
    recipe = load_recipe({"kw": 1, "model": {"input": [3], "layers": layers}})
    assert recipe.model is not None
    assert list(recipe.model.layers) == layers
