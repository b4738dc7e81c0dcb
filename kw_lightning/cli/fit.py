"""`kw fit`: train the network of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kw_lightning.cli.arguments import recipe_and_overrides


def fit(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as train.epochs=5.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|PATH", help="Continue the newest run of this recipe, a run folder or a checkpoint."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder; must not hold a run. [default: runs/NAME-NUMBER]")
    ] = None,
    allow_python: Annotated[
        list[str] | None,
        typer.Option(metavar="PKG", help="Let the recipe name things of this Python package (may be repeated)."),
    ] = None,
) -> None:
    """Train the network of a recipe with PyTorch Lightning; KEY=VALUE changes the recipe."""
    source, changes = recipe_and_overrides([recipe, *(overrides or ())])
    # slow to import: torch and lightning
    from kw_lightning.fit.run import fit as run_fit

    run_fit(
        source,
        changes,
        dry_run=dry_run,
        resume=resume,
        output=output,
        allow_python=tuple(allow_python or ()),
        show=True,
    )
