"""`kw check`: all mistakes of all recipes, nothing built and none of their code run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.cli.completion import complete_recipe
from kw_lightning.errors import KWError, Problem, RecipeError, RunError
from kw_lightning.recipe import Recipe, load_recipe


class Format(StrEnum):
    """How mistakes are printed."""

    text = "text"
    github = "github"
    json = "json"


def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES…", help="Recipe files, or names of recipes.", autocompletion=complete_recipe),
    ],
    format: Annotated[
        Format, typer.Option(help="Lines to read, GitHub's annotations, or one JSON list.")
    ] = Format.text,
    network: Annotated[
        bool,
        typer.Option(help="Compare it with its network and its training, too; without that it takes a moment."),
    ] = True,
    data: Annotated[bool, typer.Option("--data", help="Open every image of the data, too.")] = False,
    allow_python: Annotated[list[str] | None, package_option("Let the recipe name things")] = None,
) -> None:
    """Check recipes: every mistake with its file, line and column. Exit code 2 if there is one, 0 if not.

    With --data every image is opened once: damaged ones and empty classes give exit code 1, odd ones are only reported.
    """
    found: dict[Problem, None] = {}
    passed = []
    exit_code = 0
    for file in files:
        problems = problems_of(file, network=network, allow_python=tuple(allow_python or ()))
        exit_code = RecipeError.exit_code if problems else exit_code
        if data and not problems:
            problems = problems_of_data(load_recipe(file))
            exit_code = exit_code or (RunError.exit_code if problems else 0)
        found.update(dict.fromkeys(problems))
        if not problems:
            passed.append(file)
    _print(list(found), passed, format)
    if exit_code:
        raise typer.Exit(exit_code)


def problems_of(file: str, *, network: bool = True, allow_python: Sequence[str] = ()) -> list[Problem]:
    """Return the mistakes of one recipe; those against its network and training only when it has no others."""
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        return list(error.problems)
    problems = _against_network(recipe, allow_python) if network else []
    start = recipe.document.location("")
    return [problem if problem.location else replace(problem, location=start) for problem in problems]


def problems_of_data(recipe: Recipe) -> list[Problem]:
    """Open every image of a recipe's data; return what is wrong, and tell on standard error what is odd."""
    if recipe.data is None or recipe.data.name.startswith("python:"):
        typer.echo(f"{recipe.name}: no images by name to open", err=True)
        return []
    # slow to import: torch
    from kw_lightning.cli.output import counting
    from kw_lightning.fit.data.checking import check_images
    from kw_lightning.fit.data.sets import listing_of, open_source

    try:
        source = open_source(recipe, recipe.data)
        listing = listing_of(recipe.data)
    except KWError as error:
        return [Problem(line) for line in str(error).splitlines()]
    if listing is None:
        count = len(source.parts["train"])  # type: ignore[arg-type]
        typer.echo(f"{recipe.name}: {count:,} training images, not in files", err=True)
        return []
    with counting("opening", len(listing.entries)) as advance:
        checked = check_images(listing, lambda: advance(1))
    skips = recipe.data.broken == "skip"
    left_out = [f"{line}; left out, by data.broken: skip" for line in checked.broken] if skips else []
    for line in (*checked.odd, *left_out):
        typer.echo(line, err=True)
    wrong = (*checked.empty, *(() if skips else checked.broken))
    typer.echo(f"{recipe.name}: opened {checked.images:,} images, {len(checked.broken):,} cannot be read", err=True)
    return [Problem(line) for line in wrong]


def _against_network(recipe: Recipe, allow_python: Sequence[str]) -> list[Problem]:
    """Return what of a recipe fits neither its network, if it has one that may be made, nor what trains it."""
    model = recipe.model
    if model is None or not (model.backbone or model.layers):
        return []
    if (model.backbone or "").startswith("python:") and not allow_python:
        return []
    # slow to import: torch
    from kw_lightning.builder import starts_published
    from kw_lightning.planning import plan
    from kw_lightning.pretrained import check_pretrained
    from kw_lightning.recipe.classes import USUAL, with_classes

    problems: list[Problem] = []
    planned = None
    with _collected(problems):
        planned = plan(with_classes(recipe, USUAL), allow_python=allow_python)  # it stays on the meta device
    if planned is not None and not starts_published(recipe):  # without a plan there may be no such network
        with _collected(problems):
            check_pretrained(recipe, here=False)
    if recipe.train is not None or recipe.trainer:
        # slow to import: lightning
        from kw_lightning.fit.run import check_layers, check_training

        with _collected(problems):
            check_training(recipe, here=False)
        if planned is not None:
            with _collected(problems):
                check_layers(planned, allow_python=allow_python)
    return problems


@contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    """Add the mistakes that are found in the block."""
    try:
        yield
    except RecipeError as error:
        problems += error.problems
    except KWError as error:
        problems.append(Problem(" ".join(str(error).split())))


def _print(problems: Sequence[Problem], passed: Sequence[str], format: Format) -> None:
    match format:
        case Format.json:
            typer.echo(json.dumps([_as_dict(problem) for problem in problems], indent=2))
        case Format.github:
            for problem in problems:
                typer.echo(_annotation(problem))
        case Format.text:
            for problem in problems:
                typer.echo(str(problem))
            for file in passed:
                typer.echo(f"{file}: no mistakes")


def _as_dict(problem: Problem) -> dict[str, str | int | None]:
    place = problem.location
    return {
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "path": problem.path,
        "message": problem.message,
    }


def _annotation(problem: Problem) -> str:
    """Return a mistake as a workflow command of GitHub Actions, which shows it beside the line."""
    place = problem.location
    where = f" file={_property(place.file)},line={place.line},col={place.column}" if place else ""
    message = f"{problem.path}: {problem.message}" if problem.path else problem.message
    return f"::error{where}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
