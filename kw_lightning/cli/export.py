"""`kw export`: a trained network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.errors import RunError, mistake

FORMS = ("official",)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, a saved network or hf://ORG/NAME@REV.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=f"What to write: {', '.join(FORMS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")],
    allow_python: Annotated[list[str] | None, package_option("Let the recipe run code")] = None,
) -> None:
    """Write a trained network as a file that another program reads.

    official: a checkpoint in the layout of the paper's authors, for their networks.
    """
    if to not in FORMS:
        raise RunError(f"--to: {mistake(to, FORMS)}")
    if output.exists():
        raise RunError(f"{output} is there already; give a file that is not")
    # slow to import: torch
    from kw_lightning.inference import load
    from kw_lightning.inference.published import export_checkpoint

    export_checkpoint(load(model, allow_python=tuple(allow_python or ())), output)
    typer.echo(f"Wrote {output}", err=True)
