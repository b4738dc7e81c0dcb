"""The grid of a sweep, without torch: `KEY=a,b,c` taken apart, every combination a row with a telling name."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from kw_lightning.errors import Location, Problem, RecipeError, mistake, sentence
from kw_lightning.recipe.overrides import FILE

SEED = "train.seed"
RECIPE = "recipe"
MAX_ROWS = 1_000
MAX_NAME = 100
"""Characters of a folder's name; longer ones are cut, and told apart by a hash."""
_OPENS, _CLOSES, _QUOTES = "[{", "]}", "\"'"


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values that it takes, each as YAML; one value holds for all rows."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One recipe of the grid, which every seed trains.

    Attributes:
        name: of its folder.
        recipe: the file or the shipped name.
        changes: `KEY=VALUE`, one for each that the user gave, in their order.
        settings: label → value of what differs between rows.
    """

    name: str
    recipe: str
    changes: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """Return what tells the row from the others, for people."""
        return label_of(self.settings, self.name)


@dataclass(frozen=True)
class Grid:
    """All rows, and the seeds that each is trained with."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]


def make_grid(recipes: Sequence[str], arguments: Sequence[str], seeds: int | None = None) -> Grid:
    """Return the grid: every recipe with every combination of the values, the last key changing first.

    Args:
        recipes: files or names; several are an axis of their own, and the first of them the first row.
        arguments: `KEY=a,b,c` each; `train.seed=3,4` names the seeds themselves.
        seeds: how many, from 0 on; None takes 0 alone, **or** those of `train.seed`.

    Raises:
        RecipeError: a value given twice, a key that is varied and given twice, seeds that are no numbers or given
            twice, **or** too many rows.

    Example:
        >>> [row.name for row in make_grid(["net.yaml"], ["train.optimizer.lr=0.1,0.05", "train.epochs=9"]).rows]
        ['lr=0.1', 'lr=0.05']
    """
    axes = [parse_axis(text, number) for number, text in enumerate(arguments, start=1)]
    _refuse_twice(axes)
    numbers = [_seeds(axis, number) for number, axis in enumerate(axes, start=1) if axis.key == SEED]
    if len(numbers) > 1 or (numbers and seeds is not None):
        raise RecipeError(sentence("seeds given twice", f"--seeds N, or {SEED}=a,b, once"))
    axes = [Axis(SEED, ()) if axis.key == SEED else axis for axis in axes]
    size = len(recipes) * math.prod(len(axis.values) for axis in axes if axis.values)
    if size > MAX_ROWS:
        raise RecipeError(sentence(f"a grid of {size:,} rows", f"at most {MAX_ROWS:,}"))
    return Grid(_rows(recipes, axes), numbers[0] if numbers else tuple(range(seeds or 1)))


def parse_axis(text: str, number: int = 1) -> Axis:
    """Return `KEY=a,b,c` taken apart; `number` counts the arguments from 1, for messages.

    Raises:
        RecipeError: a value given twice.
    """
    key, _, values = text.partition("=")
    found = split_values(values)
    for value in found:
        if found.count(value) > 1:
            message = mistake(value, "each value once", what="several times the value")
            raise RecipeError(Problem(message, key, Location(FILE, number, len(key) + 2)))
    return Axis(key, tuple(found))


def split_values(text: str) -> list[str]:
    """Return the values between commas; a comma inside brackets, braces or quotes is part of a value.

    Example:
        >>> split_values("[8,8],[4,4]")
        ['[8,8]', '[4,4]']
    """
    values, depth, quote, start = [""], 0, "", True
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and start:  # elsewhere it is an apostrophe
            quote = character
        elif character in _OPENS:
            depth += 1
        elif character in _CLOSES:
            depth = max(depth - 1, 0)
        elif character == "," and not depth:
            values.append("")
            start = True
            continue
        values[-1] += character
        start = character in ",:[{" or (start and character == " ")
    return [value.strip() for value in values]


def label_of(settings: Iterable[tuple[str, str]], name: str) -> str:
    """Return the settings of a row in one line, `lr=0.1, batch=32`; its folder's name where there are none."""
    return ", ".join(f"{key}={value}" for key, value in settings) or name


def labels(keys: Sequence[str]) -> list[str]:
    """Return the shortest ends of keys that tell them apart: `train.optimizer.lr` is `lr`."""
    parts = [key.removesuffix("+").split(".") for key in keys]
    found = []
    for own in parts:
        length = next(n for n in range(1, len(own) + 1) if n == len(own) or sum(o[-n:] == own[-n:] for o in parts) == 1)
        found.append(".".join(own[-length:]))
    return found


def _refuse_twice(axes: Sequence[Axis]) -> None:
    """Refuse a key that is varied and given again, of which every row would have the last value; `a+=` may be."""
    for number, axis in enumerate(axes, start=1):
        others = [other for other in axes[: number - 1] if other.key == axis.key and not axis.key.endswith("+")]
        if others and axis.key != SEED and any(len(each.values) > 1 for each in (*others, axis)):
            together = ",".join(dict.fromkeys(value for each in (*others, axis) for value in each.values))
            message = sentence("this key a second time", f"each once, as {axis.key}={together}")
            raise RecipeError(Problem(message, axis.key, Location(FILE, number, 1)))


def _seeds(axis: Axis, number: int) -> tuple[int, ...]:
    for value in axis.values:
        if not re.fullmatch(r"\d{1,9}", value):
            place = Location(FILE, number, len(axis.key) + 2)
            raise RecipeError(Problem(mistake(value, "whole numbers from 0 on"), SEED, place))
    return tuple(int(value) for value in axis.values)


def _rows(recipes: Sequence[str], axes: Sequence[Axis]) -> tuple[Row, ...]:
    varying = [axis for axis in axes if len(axis.values) > 1]
    shown = labels([axis.key for axis in varying])
    names = _recipe_names(recipes)
    rows: list[Row] = []
    for recipe, name in zip(recipes, names, strict=True):
        for values in itertools.product(*(axis.values or ("",) for axis in axes)):
            changes = tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True) if axis.values)
            chosen = [value for axis, value in zip(axes, values, strict=True) if len(axis.values) > 1]
            settings = tuple(zip(shown, chosen, strict=True))
            if len(recipes) > 1:
                settings = ((RECIPE, name), *settings)
            rows.append(Row("", recipe, changes, settings))
    taken: dict[str, int] = {}
    proposed = [_folder_name(row.settings) or _safe(names[0]) for row in rows]
    for name in proposed:
        taken[name.lower()] = taken.get(name.lower(), 0) + 1
    return tuple(
        Row(_told_apart(name, row, taken[name.lower()] > 1), row.recipe, row.changes, row.settings)
        for name, row in zip(proposed, rows, strict=True)
    )


def _recipe_names(recipes: Sequence[str]) -> list[str]:
    """Return a short name of each recipe; the whole of what was given where the short ones are alike."""
    short = [PurePath(recipe).stem for recipe in recipes]
    return short if len(set(short)) == len(short) else list(recipes)


def _folder_name(settings: Sequence[tuple[str, str]]) -> str:
    return ",".join(f"{_safe(key)}={_safe(value)}" for key, value in settings)


def _safe(text: str) -> str:
    """Return a text as a part of a folder's name: 1/4 is `1-4`, and [8,8] is `8-8`."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", re.sub(r"[\[\]{}\"' ]", "", text)) or "-"


def _told_apart(name: str, row: Row, shared: bool) -> str:
    if not shared and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(repr(row.settings).encode()).hexdigest()[:6]}"
