"""What several commands take, declared once: a recipe and `key=value` overrides in any order, packages, --json."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kw_lightning.cli.completion import complete_override, complete_recipe

OVERRIDE = re.compile(r"[A-Za-z_][\w.*\[\]+-]*=")

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=complete_recipe),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, a saved network or hf://ORG/NAME@REV.")
]
CheckpointArgument = Annotated[Path, typer.Argument(metavar="RUN_OR_CKPT", help="A run folder or a checkpoint file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

SplitOption = Annotated[
    str | None,
    typer.Option(metavar="train|val|test", help="Part of the data. \\[default: test, or val where there is none]"),
]


def override_argument(help: str) -> Any:
    """Declare the overrides of a command, which says by `help` what they do there."""
    return typer.Argument(metavar="KEY=VALUE", help=help, autocompletion=complete_override)


InsideArgument = Annotated[
    list[str] | None, override_argument("Changes to the recipe inside, as data.root=/elsewhere.")
]


def package_option(permission: str) -> Any:
    """Declare --allow-python of a command; `permission` begins the help, as "Let the recipe run code"."""
    return typer.Option(metavar="PKG", help=f"{permission} of this Python package (may be repeated).")


RunCodeOption = Annotated[list[str] | None, package_option("Let the recipe run code")]


def recipe_and_overrides(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split what stands on the command line into the recipe and its overrides.

    An argument is an override when it reads `key=…` and no file has that name.

    Raises:
        typer.BadParameter: there is no recipe, or more than one.
    """
    recipes, overrides = recipes_and_overrides(arguments)
    if len(recipes) != 1:
        found = "none" if not recipes else " and ".join(f'"{recipe}"' for recipe in recipes)
        raise typer.BadParameter(f"one recipe is needed, found {found}; overrides are written key=value")
    return recipes[0], overrides


def recipes_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what stands on the command line as `recipe_and_overrides` does, into any number of recipes."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument) and not os.path.exists(argument)]
    return [argument for argument in arguments if argument not in overrides], overrides
