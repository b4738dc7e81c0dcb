"""Arguments that several commands take: a recipe and `key=value` overrides, in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import typer

OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]+-]*=")


def recipe_and_overrides(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split what stands on the command line into the recipe and its overrides.

    An argument is an override when it reads `key=…` and no file has that name.

    Raises:
        typer.BadParameter: there is no recipe, or more than one.
    """
    overrides = [argument for argument in arguments if OVERRIDE.match(argument) and not Path(argument).exists()]
    recipes = [argument for argument in arguments if argument not in overrides]
    if len(recipes) != 1:
        found = "none" if not recipes else " and ".join(f'"{recipe}"' for recipe in recipes)
        raise typer.BadParameter(f"one recipe is needed, found {found}; overrides are written key=value")
    return recipes[0], overrides
