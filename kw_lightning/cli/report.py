"""`kw report`: a run, or several beside each other, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kw_lightning.cli.arguments import RunCodeOption
from kw_lightning.errors import RunError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="A run folder or a checkpoint; several, or a folder of runs, to compare."
        ),
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
        Path | None, typer.Option(metavar="FILE", help="The page. \\[default: report.html in the folder]")
    ] = None,
    allow_python: RunCodeOption = None,
) -> None:
    """Write a run as one page, report.html, that works offline: curves, answers, images, what the warehouses learnt.

    Several runs, or a folder of them as that of kw sweep, become one page that compares them: their curves in one
    chart, where recipes and plans differ, seeds as mean and deviation.

    confusion.csv and classes.csv beside it are for programs. Every kw-fit ends with one, unless log.report=false.
    """
    # slow to import: torch and lightning
    from kw_lightning.report import report as write
    from kw_lightning.report.comparison import compare, is_folder_of_runs

    packages = tuple(allow_python or ())
    if len(runs) == 1 and not is_folder_of_runs(Path(runs[0])):
        written = write(runs[0], changes or (), split=split, output=output, allow_python=packages)
    elif changes or split is not None:
        raise RunError("--set and --split are for a single run; several are compared by what their folders hold")
    else:
        written = compare(runs, output=output, allow_python=packages, **_of_sweep(runs))
    typer.echo(written.path)


def _of_sweep(runs: list[str]) -> dict[str, Any]:
    """Return the table of a folder that is one sweep's, and the names of its rows."""
    from kw_lightning.report.page import Table
    from kw_lightning.sweep.folder import SweepFolder
    from kw_lightning.sweep.results import read_results
    from kw_lightning.sweep.table import text_rows

    folder = SweepFolder(Path(runs[0]))
    manifest = folder.manifest() if len(runs) == 1 else None
    if manifest is None:
        return {}
    head, *rows = text_rows(read_results(folder, manifest))
    return {"tables": [Table("The sweep", head, rows)], "names": {row.name: row.label for row in manifest.rows}}
