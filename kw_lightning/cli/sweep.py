"""`kw sweep`: a grid of runs, and the table that compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kw_lightning.cli.arguments import JsonOption, package_option, recipes_and_overrides
from kw_lightning.cli.completion import complete_recipe
from kw_lightning.errors import listed, mistake, printable
from kw_lightning.paths import user_path
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.sweep.grid import Grid, make_grid
from kw_lightning.sweep.loading import load_rows

FAILED = 1
"""The exit code where a run failed."""
SHOWN = 10
"""Unfinished runs that are named."""


def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… KEY=a,b,c…",
            help="Recipes, and the keys to vary; or the folder of a sweep, to go on with it.",
            autocompletion=complete_recipe,
        ),
    ],
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Runs of each row, with the seeds 0, 1, … [default: 1]")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1000, help="Processes at a time.")] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the sweep. \\[default: runs/NAME-sweep]")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the table of what is finished, and run nothing.")
    ] = False,
    launcher: Annotated[
        str, typer.Option(metavar="local|slurm|ray", help="What makes the runs; slurm and ray need their extras.")
    ] = "local",
    options: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="For slurm or ray, as slurm_partition=gpu or num_gpus=1."),
    ] = None,
    json: JsonOption = False,
    allow_python: Annotated[list[str] | None, package_option("Let the recipes run code")] = None,
) -> None:
    """Train every combination of settings and seeds, and compare them with the first.

    KEY=a,b,c takes each value in turn, as YAML: a comma inside brackets or quotes belongs to a value. `*` is every key
    of a map, as warehouses.*.budget=1/4,1/2,1. Each run is one of kw-fit in a folder of its own. The same command goes
    on where it stopped; finished runs stay. If a run fails, the others go on, and the exit code is 1.
    """
    recipes, settings = recipes_and_overrides(arguments)
    source = _source(recipes, settings, seeds, output)
    if not isinstance(source, Path):
        load_rows(source.rows)  # their mistakes are told before what is slow to import: torch and lightning
    from kw_lightning.cli.output import console, error_console
    from kw_lightning.sweep.engines import engine_of
    from kw_lightning.sweep.folder import SweepFolder
    from kw_lightning.sweep.results import read_results
    from kw_lightning.sweep.run import default_folder, open_sweep
    from kw_lightning.sweep.run import sweep as make
    from kw_lightning.sweep.table import json_of, markdown

    aside = error_console()

    def tell(line: str) -> None:
        aside.print(line, highlight=False, soft_wrap=True)

    failed = False
    if table:
        folder, manifest = open_sweep(source if isinstance(source, Path) else output or default_folder(source))
        results = read_results(folder, manifest)
    else:
        packages = tuple(allow_python or ())
        place = source if isinstance(source, Path) else user_path(output or default_folder(source))
        begin = engine_of(launcher, place, _options(options or ()))
        outcome = make(source, output=output, jobs=jobs, begin=begin, allow_python=packages, tell=tell)
        folder, results, failed = SweepFolder(outcome.folder), outcome.results, bool(outcome.failed)
    if json:
        typer.echo(json_of(results, folder), nl=False)
    else:
        console().print(markdown(results), highlight=False, soft_wrap=True)
        _tell_missing(results.missing, tell)
        tell(f"sweep folder: {folder.path}")
    if failed:
        raise typer.Exit(FAILED)


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` as a map, the values read as YAML.

    Raises:
        typer.BadParameter: anything else.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(mistake(text, "key=value, as num_gpus=1"))
        found[key] = read_yaml(value, "--with").plain()
    return found


def _source(recipes: Sequence[str], settings: Sequence[str], seeds: int | None, output: Path | None) -> Grid | Path:
    """Return the grid of what stands on the command line, or the folder of a sweep.

    Raises:
        typer.BadParameter: neither, **or** both.
    """
    if not recipes:
        raise typer.BadParameter("a recipe, or the folder of a sweep, is needed; settings are written key=a,b,c")
    folders = [recipe for recipe in recipes if user_path(recipe).is_dir()]
    if not folders:
        return make_grid(recipes, settings, seeds)
    if len(recipes) > 1 or settings or seeds is not None or output is not None:
        raise typer.BadParameter(
            f"{folders[0]} is a folder: a sweep goes on with its own recipes, settings and seeds; give the recipe and "
            "all settings again to change them"
        )
    return user_path(folders[0])


def _tell_missing(missing: Sequence[tuple[str, int]], tell: Callable[[str], None]) -> None:
    if missing:
        named = listed([printable(f"{row}, seed {seed}") for row, seed in missing], SHOWN, "; ")
        tell(f"not finished: {named}")
