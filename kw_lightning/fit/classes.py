"""The number of classes that a recipe leaves open, from its data."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.errors import RecipeError
from kw_lightning.fit.data import data_module
from kw_lightning.fit.data.sets import open_source
from kw_lightning.recipe.classes import open_classes, with_classes
from kw_lightning.recipe.types import Recipe


def resolved(recipe: Recipe, *, allow_python: Sequence[str] = ()) -> Recipe:
    """Return the recipe with the number of classes of its data where it says `auto`; itself where it does not.

    Raises:
        RecipeError: no data, **or** data of one's own that does not say `num_classes`.
        RunError: the data is not there.
    """
    places = open_classes(recipe)
    if not places:
        return recipe
    if recipe.data is None:
        message = "auto is the number of classes of the data, and the recipe names no data; give a number"
        raise RecipeError([recipe.document.problem(path, message) for path in places])
    if not recipe.data.name.startswith("python:"):
        return with_classes(recipe, open_source(recipe, recipe.data).num_classes)
    number = getattr(data_module(recipe, allow_python=allow_python), "num_classes", None)
    if not isinstance(number, int):
        message = f'auto is the attribute num_classes of "{recipe.data.name}", which it does not have; give a number'
        raise RecipeError([recipe.document.problem(path, message) for path in places])
    return with_classes(recipe, number)
