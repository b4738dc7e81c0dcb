"""Plain data that knows where it stands: what every step between the file and the typed recipe works on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kw_lightning.errors import Location, Problem, RecipeError, mistake, sentence
from kw_lightning.recipe.limits import MAX_DEPTH, MAX_DIGITS, MAX_VALUES
from kw_lightning.recipe.scalars import Scalar, is_unicode

TEXT_OF_A_VALUE = 256
"""Characters that count as one more value, so that aliases of a long text are bounded, too."""


@dataclass(frozen=True)
class Node:
    """One value of a recipe; nodes are never changed, so an alias may share one.

    Attributes:
        value: a scalar, a list of nodes, or a map from keys to nodes.
        location: where the value starts; None for data that came from Python.
        key_location: where its key stands, if it has one.
        size: values in it, itself included, with aliases expanded; a long text counts as several.
        depth: maps and lists inside each other.
    """

    value: Scalar | list[Node] | dict[str, Node]
    location: Location | None = None
    key_location: Location | None = None
    size: int = field(init=False, compare=False)
    depth: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        children = self.children
        nested = isinstance(self.value, dict | list)
        text = len(self.value) // TEXT_OF_A_VALUE if isinstance(self.value, str) else 0
        object.__setattr__(self, "size", 1 + text + sum(child.size for child in children))
        object.__setattr__(self, "depth", max((child.depth for child in children), default=0) + nested)

    @property
    def children(self) -> tuple[Node, ...]:
        """Return the values directly inside."""
        if isinstance(self.value, dict):
            return tuple(self.value.values())
        return tuple(self.value) if isinstance(self.value, list) else ()

    @property
    def place(self) -> Location | None:
        """Return where a message about this value points: a scalar at itself, a map or list at its key."""
        if isinstance(self.value, dict | list) and self.key_location is not None:
            return self.key_location
        return self.location

    def plain(self) -> Any:
        """Return the value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """Yield every value inside with its key path, outer ones first."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk(join(path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk(join(path, index))

    def moved(self, key_location: Location | None) -> Node:
        """Return the same value under another key."""
        return Node(self.value, self.location, key_location)


def join(path: str, key: str | int) -> str:
    """Return the path of a key or index inside a path: `a.b` or `a[0]`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    key = key if key.isprintable() else json.dumps(key)
    return f"{path}.{key}" if path else key


def join_all(keys: Iterator[str | int] | tuple[str | int, ...]) -> str:
    """Return the path of several keys in a row."""
    path = ""
    for key in keys:
        path = join(path, key)
    return path


def from_python(value: object) -> Node:
    """Return the nodes of plain Python data: a recipe given as a mapping.

    Raises:
        RecipeError: data no YAML file could hold: other types, numbers that are not finite, keys that are no text,
            cycles, or too much of it.
    """
    return _Reader().read(value, "", 0)


class _Reader:
    def __init__(self) -> None:
        self.count = 0

    def read(self, value: object, path: str, depth: int) -> Node:
        self.count += 1
        if depth > MAX_DEPTH:
            raise RecipeError(Problem(f"nested deeper than {MAX_DEPTH}", path))
        if self.count > MAX_VALUES:
            raise RecipeError(Problem(f"more than {MAX_VALUES:,} values", path))
        if isinstance(value, str) and not is_unicode(value):
            raise RecipeError(Problem(sentence("half of a surrogate pair", "text of Unicode characters"), path))
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not is_unicode(key):
                    raise RecipeError(Problem(mistake(key, "a text", what="the key"), path))
            return Node({key: self.read(item, join(path, key), depth + 1) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return Node([self.read(item, join(path, index), depth + 1) for index, item in enumerate(value)])
        if isinstance(value, Fraction):
            return Node(str(value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Node(_number(value, path))
        if value is None or isinstance(value, str | bool):
            return Node(value)
        name = type(value).__name__
        raise RecipeError(Problem(sentence(f"a Python {name}", "text, number, true, false, list, map"), path))


def _number(value: float, path: str) -> int | float:
    """Return a number as plain Python has it, NumPy's too.

    Raises:
        RecipeError: the language has no such number.
    """
    plain = int(value) if isinstance(value, int) else float(value)
    if isinstance(plain, int) and abs(plain) >= 10**MAX_DIGITS:
        raise RecipeError(Problem(sentence("a longer number", f"at most {MAX_DIGITS} digits"), path))
    if isinstance(plain, float) and not math.isfinite(plain):
        raise RecipeError(Problem(mistake(plain, "a finite number"), path))
    return plain
