"""Callbacks of one's own that a recipe names; their code runs only where it is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning.pytorch import Callback

from kw_lightning.backbones import import_callable
from kw_lightning.errors import RecipeError, first_line, sentence
from kw_lightning.recipe.types import Recipe


def own_callbacks(recipe: Recipe, *, allow_python: Sequence[str] = ()) -> list[Callback]:
    """Return the callbacks of section `callbacks`, made with their arguments; Lightning keeps their state.

    Args:
        recipe: the recipe.
        allow_python: packages whose code the recipe may name.

    Raises:
        RecipeError: a package that is not allowed, arguments that the class refuses, what is no callback, **or** two
            whose state a checkpoint could not tell apart.
    """
    made: list[Callback] = []
    for index, own in enumerate(recipe.callbacks):
        place = f"callbacks[{index}]"
        factory = import_callable(own.name, allow_python, partial(recipe.document.problem, place))
        try:
            callback = factory(**own.args)
        except (TypeError, ValueError) as error:  # its own checks
            raise RecipeError(recipe.document.problem(place, f'"{own.name}": {first_line(error)}')) from error
        if not isinstance(callback, Callback):
            message = sentence(f'"{own.name}", which gave a {type(callback).__name__}', "a Callback of Lightning")
            raise RecipeError(recipe.document.problem(place, message))
        if any(type(callback) is type(other) and callback.state_key == other.state_key for other in made):
            message = sentence(f'"{own.name}" twice', "once, or a state_key that tells them apart in a checkpoint")
            raise RecipeError(recipe.document.problem(place, message))
        made.append(callback)
    return made
