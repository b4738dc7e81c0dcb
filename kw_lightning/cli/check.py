"""`kw check`: all mistakes of all recipes, nothing built and none of their code run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.cli.completion import complete_recipe
from kw_lightning.errors import KWError, Problem, RecipeError
from kw_lightning.recipe import Recipe, load_recipe


class Format(str, Enum):
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
        bool, typer.Option(help="Compare the recipe with its network, too; without it the check takes a moment.")
    ] = True,
    allow_python: Annotated[list[str] | None, package_option("Let the recipe name things")] = None,
) -> None:
    """Check recipes: every mistake with its file, line and column. Exit code 2 if there is one, 0 if not."""
    found: dict[Problem, None] = {}
    passed = []
    for file in files:
        problems = problems_of(file, network=network, allow_python=tuple(allow_python or ()))
        found.update(dict.fromkeys(problems))
        if not problems:
            passed.append(file)
    _print(list(found), passed, format)
    if found:
        raise typer.Exit(RecipeError.exit_code)


def problems_of(file: str, *, network: bool = True, allow_python: Sequence[str] = ()) -> list[Problem]:
    """Return the mistakes of one recipe; those against its network only when it has no others."""
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        return list(error.problems)
    try:
        if network:
            _compare_with_network(recipe, allow_python)
    except RecipeError as error:
        problems = list(error.problems)
    except KWError as error:
        problems = [Problem(" ".join(str(error).split()))]
    else:
        return []
    start = recipe.document.location("")
    return [problem if problem.location else replace(problem, location=start) for problem in problems]


def _compare_with_network(recipe: Recipe, allow_python: Sequence[str]) -> None:
    """Plan the recipe's network, if it has one that may be made: it stays on the meta device."""
    model = recipe.model
    if model is None or not (model.backbone or model.layers):
        return
    if (model.backbone or "").startswith("python:") and not allow_python:
        return
    # slow to import: torch
    from kw_lightning.planning import plan
    from kw_lightning.recipe.classes import USUAL, with_classes

    plan(with_classes(recipe, USUAL), allow_python=allow_python)


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
