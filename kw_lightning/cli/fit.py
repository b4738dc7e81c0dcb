"""`kw fit`: train the network of a recipe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import RecipeArgument, RunCodeOption, override_argument, recipe_and_overrides


class OnNan(StrEnum):
    """What `--on-nan` takes."""

    stop = "stop"
    warn = "warn"


def fit(
    recipe: RecipeArgument,
    overrides: Annotated[list[str] | None, override_argument("Changes to the recipe, as train.epochs=5.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue a run folder or a checkpoint; with auto the newest run of this recipe, if there is one.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Begin a new run with the weights of a run folder or a checkpoint."),
    ] = None,
    on_nan: Annotated[
        OnNan, typer.Option(metavar="stop|warn", help="What happens at the first loss that is not a number.")
    ] = OnNan.stop,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder, new or empty. \\[default: runs/NAME-NUMBER]")
    ] = None,
    allow_python: RunCodeOption = None,
) -> None:
    """Train the network of a recipe with PyTorch Lightning; KEY=VALUE changes the recipe.

    Prints the plan, the progress and the metrics, and writes a run folder: the resolved recipe, versions,
    metrics.csv, TensorBoard events, the checkpoints last.ckpt and best.ckpt, and report.html to look at.
    """
    from kw_lightning.recipe import load_recipe

    source, changes = recipe_and_overrides([recipe, *(overrides or ())])
    loaded = load_recipe(source, changes)  # its mistakes are told before what is slow to import: torch and lightning
    from kw_lightning.builder import starts_published
    from kw_lightning.cli.output import console, warn
    from kw_lightning.fit.classes import resolved
    from kw_lightning.fit.distillation import find_teacher
    from kw_lightning.fit.interruption import is_first_process
    from kw_lightning.fit.optimization import warn_of_a_short_run
    from kw_lightning.fit.report import metrics_table
    from kw_lightning.fit.run import check_layers, check_training
    from kw_lightning.fit.run import fit as train
    from kw_lightning.planning import plan
    from kw_lightning.planning.table import PlanTable
    from kw_lightning.preprocessing import warn_of_contradictions
    from kw_lightning.pretrained import check_pretrained

    screen = console()
    screen.quiet = not is_first_process()
    packages = tuple(allow_python or ())
    loaded = resolved(loaded, allow_python=packages)
    planned = plan(loaded, allow_python=packages)
    screen.print(PlanTable(planned))
    if is_first_process():
        warn(planned.warning)
    if dry_run:
        check_training(loaded, here=False)
        check_layers(planned, allow_python=packages)
        if init is None and not starts_published(loaded):
            check_pretrained(loaded)
        find_teacher(loaded, None, allow_python=packages)
        warn_of_contradictions(loaded)
        warn_of_a_short_run(loaded)
        return
    result = train(planned, resume=resume, init=init, output=output, allow_python=packages, on_nan=on_nan.value)
    if result.columns:
        screen.print(metrics_table(result.columns, result.note))
    screen.print(f"run folder: {result.folder}", highlight=False, soft_wrap=True)
    if result.report is not None:
        screen.print(f"report: {result.report}", highlight=False, soft_wrap=True)
