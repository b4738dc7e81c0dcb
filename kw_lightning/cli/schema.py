"""`kw schema`: the JSON Schema of the recipe language, for editors and other tools."""

from __future__ import annotations

import typer

from kw_lightning.recipe.schema import schema_text


def schema() -> None:
    """Print the JSON Schema of the recipe language."""
    typer.echo(schema_text(), nl=False)
