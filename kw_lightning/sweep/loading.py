"""The recipes of a grid's rows, without torch; the mistakes of all rows come together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kw_lightning.errors import Problem, RecipeError, printable
from kw_lightning.recipe import Recipe, load_recipe
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.validation import sort
from kw_lightning.sweep.grid import Row

Made = TypeVar("Made")


def load_rows(rows: Sequence[Row]) -> list[Recipe]:
    """Return the recipe of every row.

    Raises:
        RecipeError: every mistake of every row, each once, **or** rows that are the same recipe.
    """
    recipes = each(rows, lambda row: load_recipe(row.recipe, row.changes))
    first: dict[str, Row] = {}
    for row, recipe in zip(rows, recipes, strict=True):
        data = {key: value for key, value in recipe.document.data.items() if key not in ("name", "description")}
        same = first.setdefault(content_hash(data), row)
        if same is not row:
            raise RecipeError(f"{same.label} and {row.label} are the same recipe; give each once")
    return recipes


def each(rows: Sequence[Row], make: Callable[[Row], Made]) -> list[Made]:
    """Return what is made of every row; raise the mistakes of all together, told apart by the row that has them."""
    made: list[Made] = []
    problems: dict[Problem, list[str]] = {}
    for row in rows:
        try:
            made.append(make(row))
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(row.label)
    if problems:
        raise RecipeError(sort(_named(problem, found, len(rows)) for problem, found in problems.items()))
    return made


def _named(problem: Problem, labels: Sequence[str], rows: int) -> Problem:
    """Return a problem with the first row that has it, where not every one has."""
    if len(labels) == rows:
        return problem
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return replace(problem, message=f"{problem.message} (row {printable(labels[0])}{more})")
