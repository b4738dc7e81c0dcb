"""`kw lock`: a recipe as one resolved file, with the hashes of all that it came from."""

from __future__ import annotations

from typing import Annotated

import typer

from kw_lightning.cli.arguments import RecipeArgument, override_argument, recipe_and_overrides
from kw_lightning.errors import RunError
from kw_lightning.paths import user_path, writable
from kw_lightning.recipe import load_recipe, lock_text
from kw_lightning.recipe.locking import MARK


def lock(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, override_argument("Changes to the recipe.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="File to write, - for the output. [default: NAME.lock.yaml]")
    ] = None,
) -> None:
    """Write a recipe as one file that holds everything it extends, and that is refused once it is changed."""
    source, changes = recipe_and_overrides([recipe, *(overrides or ())])
    loaded = load_recipe(source, changes)
    text = lock_text(loaded)
    if output == "-":
        typer.echo(text, nl=False)
        return
    file = user_path(output or f"{loaded.name}.lock.yaml")
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:500]:
        raise RunError(f"{file} is there already and is no lock; give another name by --output")
    with writable(file) as partial:
        partial.write_text(text, encoding="utf-8")
    sources = ", ".join(source.file for source in loaded.document.sources)
    typer.echo(f"Wrote {file}, from {sources}.", err=True)
