"""`kw plan`: what a recipe does to its network, without making it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import (
    JsonOption,
    RecipeArgument,
    override_argument,
    package_option,
    recipe_and_overrides,
)

if TYPE_CHECKING:
    from kw_lightning.recipe.types import Recipe


def plan(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None, override_argument("Changes to the recipe, as warehouses.stage4.budget=1/4.")
    ] = None,
    warm_start: Annotated[
        bool,
        typer.Option(
            "--warm-start", help="Load the weights of model.pretrained, and show how near each warehouse comes to them."
        ),
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="Show how each dynamic layer is computed, and why no other way.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples of a batch, with --engine; default: 1.")] = None,
    json: JsonOption = False,
    allow_python: Annotated[list[str] | None, package_option("Let the recipe name things")] = None,
) -> None:
    """Show warehouses, cells, parameters and multiply-adds of a recipe, beside the static network's."""
    from kw_lightning.recipe import load_recipe

    if batch is not None and not engine:
        raise typer.BadParameter("--batch needs --engine", param_hint="--batch")
    source, changes = recipe_and_overrides([recipe, *(overrides or ())])
    loaded = load_recipe(source, changes)  # its mistakes are told before what is slow to import: torch
    from rich.text import Text

    from kw_lightning.cli.output import console, warn
    from kw_lightning.planning import plan as make_plan
    from kw_lightning.planning.table import PlanTable
    from kw_lightning.preprocessing import preprocessing, warn_of_contradictions

    allowed = tuple(allow_python or ())
    loaded = _with_classes(loaded, allowed)
    planned = make_plan(loaded, allow_python=allowed)
    warn(planned.warning)
    warn_of_contradictions(loaded)
    errors = {}
    if warm_start:
        from kw_lightning.builder import warm_start_errors

        errors = dict(warm_start_errors(planned, allow_python=allowed))
    if json:
        from json import dumps

        steps = preprocessing(loaded)
        more = {"warm_start": errors} if warm_start else {}
        found = {**planned.to_dict(), "preprocessing": None if steps is None else steps.to_dict(), **more}
        if engine:
            from kw_lightning.planning.engine import plan_engine

            found["engine"] = plan_engine(planned, batch or 1).to_dict()
        typer.echo(dumps(found))
        return
    if engine:
        from kw_lightning.planning.engine import plan_engine
        from kw_lightning.planning.engine_table import engine_lines

        typer.echo("\n".join(engine_lines(plan_engine(planned, batch or 1))))
        return
    if loaded.model is not None and loaded.model.layers:
        from kw_lightning.keras import read_network
        from kw_lightning.keras.table import SummaryTable

        console().print(SummaryTable(read_network(loaded, allow_python=allowed)), Text(""), sep="\n")
    console().print(PlanTable(planned, errors=errors))


def _with_classes(recipe: Recipe, allowed: tuple[str, ...]) -> Recipe:
    """Return the recipe with the classes of its data; with the usual number, and a word of it, where it is not here."""
    from kw_lightning.recipe.classes import USUAL, open_classes, with_classes

    places = open_classes(recipe)
    if not places:
        return recipe
    from kw_lightning.cli.output import warn
    from kw_lightning.errors import KWError, first_line
    from kw_lightning.fit.classes import resolved

    try:
        return resolved(recipe, allow_python=allowed)
    except KWError as error:
        warn(f"{places[0]} is auto, and the data is not here: planned with {USUAL:,} classes. {first_line(error)}")
        return with_classes(recipe, USUAL)
