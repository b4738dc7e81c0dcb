"""`kw import`: the authors' files: a checkpoint as a saved network, a configuration as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_published(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint (.pth) or a configuration (.json).")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new folder for the network, a new file for the recipe (else printed)."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="The checkpoint's. [default: the published recipe that fits]"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=1, help="τ, which the authors do not store.")] = 0.0,
    averaged: Annotated[bool, typer.Option("--averaged", help="Take the averaged weights (model_ema).")] = False,
    backbone_only: Annotated[
        bool, typer.Option("--backbone-only", help="A detector's checkpoint: the classifier keeps its start values.")
    ] = False,
) -> None:
    """Turn a checkpoint of the paper's authors into a saved network, or a configuration of theirs into a recipe."""
    if file.suffix == ".json":
        _configuration(file, output)
        return
    from kw_lightning.errors import RunError

    if output is None:
        raise RunError("a checkpoint needs --output FOLDER for the network")
    if output.exists():
        raise RunError(f"{output} is there already; give a folder that is not")
    # slow to import: torch
    from kw_lightning.inference.published import import_checkpoint

    used = import_checkpoint(
        file, output, recipe, temperature=temperature, averaged=averaged, backbone_only=backbone_only
    )
    typer.echo(f"Wrote {output}, a network of {used}; images: kw predict {output} IMAGES", err=True)


def _configuration(file: Path, output: Path | None) -> None:
    from kw_lightning.published.configuration import configuration_text, read_configuration

    recipe, left = read_configuration(file)
    text = configuration_text(recipe)
    if output is None:
        typer.echo(text, nl=False)
    else:
        from kw_lightning.errors import RunError
        from kw_lightning.paths import writable

        if output.exists():
            raise RunError(f"{output} is there already; give a file that is not")
        with writable(output) as partial:
            partial.write_text(text, encoding="utf-8")
    if left:
        typer.echo(f"Not in the recipe, since they are of the training: {', '.join(left)}", err=True)
