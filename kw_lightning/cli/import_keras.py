"""`kw import-keras`: from a model of Keras to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_keras(
    model: Annotated[Path, typer.Argument(metavar="MODEL.json", help="What model.to_json() of Keras 3 wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; without it the recipe is printed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The recipe's name; the model's unless given.")] = None,
) -> None:
    """Turn the JSON of a Keras model into a recipe: a network to which warehouses are then added.

    Layers that a recipe does not have are listed, all at once. Weights are not in the JSON and start anew.
    """
    # slow to import: torch
    from kw_lightning.errors import RunError
    from kw_lightning.keras.importing import import_keras as convert
    from kw_lightning.keras.importing import recipe_text
    from kw_lightning.paths import user_path

    try:
        text = user_path(model).read_bytes()
    except OSError as error:
        raise RunError(f"{model}: cannot be read: {error.strerror}") from error
    recipe = recipe_text(convert(text, file=str(model), name=name))
    if output is None:
        typer.echo(recipe, nl=False)
        return
    try:
        with user_path(output).open("x", encoding="utf-8") as file:
            file.write(recipe)
    except FileExistsError:
        raise RunError(f"{output}: there is such a file already; it is left as it is") from None
    except OSError as error:
        raise RunError(f"{output}: cannot be written: {error.strerror}") from error
