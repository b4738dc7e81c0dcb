"""`kw report`: a run, or several beside each other, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import package_option


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run folder or a checkpoint; several are compared.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe inside, as data.root=/elsewhere."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="train|val|test", help="Part of the data to look at. \\[default: test, or val]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. \\[default: report.html in the run folder]")
    ] = None,
    allow_python: Annotated[list[str] | None, package_option("Let the recipe run code")] = None,
) -> None:
    """Write a run as one page, report.html, that needs no network: curves, answers, images, what the warehouses learnt.

    confusion.csv and classes.csv beside it are for programs. Every kw-fit ends with one, unless log.report=false.
    """
    # slow to import: torch and lightning
    from kw_lightning.report import report as write

    written = write(runs[0], changes or (), split=split, output=output, allow_python=tuple(allow_python or ()))
    typer.echo(written.path)
