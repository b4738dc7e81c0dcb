"""`num_classes: auto` and `units: auto`: the number of classes that the data will say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kw_lightning.recipe.conversion import convert
from kw_lightning.recipe.nodes import join
from kw_lightning.recipe.types import Recipe

AUTO = "auto"
USUAL = 1000
"""Classes that are assumed where the data is not at hand: ImageNet's, which most networks have by default."""


def open_classes(recipe: Recipe) -> list[str]:
    """Return the key paths at which a recipe leaves the number of classes to the data."""
    found: list[str] = []
    _filled(recipe.document.data.get("model", {}), "model", None, found)
    return found


def with_classes(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with a number of classes wherever it leaves it open; itself where it does not."""
    if not open_classes(recipe):
        return recipe
    document = recipe.document
    data = {**document.data, "model": _filled(document.data["model"], "model", number, [])}
    return convert(data, replace(document, data=data))


def _filled(value: Any, path: str, number: int | None, found: list[str]) -> Any:
    if isinstance(value, list):
        return [_filled(item, f"{path}[{index}]", number, found) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    filled = {}
    for key, child in value.items():
        inner = join(path, key)
        if child == AUTO and (inner == "model.args.num_classes" or (key == "units" and path != "model.args")):
            found.append(inner)
            filled[key] = number
        else:
            filled[key] = _filled(child, inner, number, found)
    return filled
