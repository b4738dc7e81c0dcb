"""`kw schema`: the JSON Schema of the recipe language, for editors and other tools."""

from __future__ import annotations

import json

import typer

from kw_lightning.recipe.schema import editor_schema


def schema() -> None:
    """Print the JSON Schema of the recipe language, for files as they are written: before what they extend is known."""
    typer.echo(json.dumps(editor_schema(), indent=2, ensure_ascii=False))
