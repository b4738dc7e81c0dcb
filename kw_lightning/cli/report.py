"""`kw report`: a run, or several beside each other, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.errors import RunError

if TYPE_CHECKING:
    from kw_lightning.report.page import Table


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
    allow_python: Annotated[list[str] | None, package_option("Let the recipe run code")] = None,
) -> None:
    """Write a run as one page, report.html, that needs no network: curves, answers, images, what the warehouses learnt.

    Several runs, or a folder of them as that of kw sweep, become one page that compares them: curves over each other,
    what recipes and plans have otherwise, seeds as mean and deviation.

    confusion.csv and classes.csv beside it are for programs. Every kw-fit ends with one, unless log.report=false.
    """
    # slow to import: torch and lightning
    from kw_lightning.report import report as write
    from kw_lightning.report.comparison import compare, is_folder_of_runs

    packages = tuple(allow_python or ())
    if len(runs) == 1 and not is_folder_of_runs(Path(runs[0])):
        written = write(runs[0], changes or (), split=split, output=output, allow_python=packages)
    elif changes or split is not None:
        raise RunError("--set and --split are for a single run; several are compared as their folders tell of them")
    else:
        written = compare(runs, output=output, allow_python=packages, tables=_sweep_tables(runs))
    typer.echo(written.path)


def _sweep_tables(runs: list[str]) -> list[Table]:
    """Return the table of a folder that is one sweep's."""
    from kw_lightning.report.page import Table
    from kw_lightning.sweep.folder import SweepFolder
    from kw_lightning.sweep.results import read_results
    from kw_lightning.sweep.table import text_rows

    folder = SweepFolder(Path(runs[0]))
    manifest = folder.manifest() if len(runs) == 1 else None
    if manifest is None:
        return []
    head, *rows = text_rows(read_results(folder, manifest))
    return [Table("The sweep", head, rows)]
