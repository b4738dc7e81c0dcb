"""`kw show`: a recipe as it is written, or as it is understood with the origin of every value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import RecipeArgument, override_argument, recipe_and_overrides
from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.sources import NotFoundError, open_source
from kw_lightning.recipe.types import Document
from kw_lightning.recipe.variables import escape
from kw_lightning.recipe.writing import to_yaml


def show(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, override_argument("Changes to the recipe; they imply --resolved.")] = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With all that it extends, each value with the place it comes from.")
    ] = False,
    origin: Annotated[bool, typer.Option(help="With --resolved: name the places.")] = True,
) -> None:
    """Print a recipe as it is written or, with --resolved, as it is understood."""
    source, changes = recipe_and_overrides([recipe, *(overrides or ())])
    if resolved or changes:
        document = load_recipe(source, changes).document
        typer.echo(to_yaml(escape(document.data), _origins(document) if origin else None), nl=False)
        return
    try:
        content = open_source(source).read()
    except NotFoundError as error:
        raise RecipeError(str(error)) from None
    text = content.decode("utf-8", errors="replace")
    # A stranger's file cannot move the cursor or change the window's title.
    typer.echo("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text), nl=False)


def _origins(document: Document) -> Callable[[str], str | None]:
    folder = f"{Path.cwd()}/"

    def origin(path: str) -> str | None:
        place = document.locations.get(path)
        return f"{place.file.removeprefix(folder)}:{place.line}" if place is not None else None

    return origin
