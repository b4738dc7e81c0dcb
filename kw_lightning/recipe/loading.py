"""From a file (or a mapping) to a `Recipe`: read, extend, override, fill in, validate, type.

Every step works on nodes that know where they stand, and adds to one list of problems; they are raised together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kw_lightning.errors import Location, Problem, RecipeError, kind, mistake, sentence
from kw_lightning.recipe import sources
from kw_lightning.recipe.checks import check
from kw_lightning.recipe.conversion import convert
from kw_lightning.recipe.limits import MAX_BYTES, MAX_EXTENDS_DEPTH, MAX_FILES, MAX_VALUES
from kw_lightning.recipe.locking import verify
from kw_lightning.recipe.merging import merge
from kw_lightning.recipe.nodes import Node, from_python
from kw_lightning.recipe.overrides import override
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.recipe.schema import VERSION, schema
from kw_lightning.recipe.sources import NotFoundError, Source
from kw_lightning.recipe.tidying import tidy
from kw_lightning.recipe.types import Document, Recipe, SourceFile
from kw_lightning.recipe.validation import sort, validate
from kw_lightning.recipe.variables import substitute
from kw_lightning.versions import version_of

_OWN = ("name", "description")
"""Keys that a recipe does not take from the one it extends."""
_FILE_KEYS = ("extends", "lock")
"""Keys that belong to a file and not to the recipe it is a part of."""


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, resolve what it extends, apply overrides, check it, and return it typed.

    Args:
        source: a path, the name of a shipped recipe (`kw list`), or the data itself.
        overrides: changes as `train.epochs=5`, applied last.

    Raises:
        RecipeError: every mistake found, each with its file, line and column.
        TypeError: a `source` of another type.

    Example:
        >>> recipe = load_recipe({"kw": 1, "warehouses": {"all": {"layers": ["*"], "budget": "1/2"}}})
        >>> recipe.warehouses[0].budget.ratio
        Fraction(1, 2)
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        allowed = "a path, the name of a shipped recipe, or the recipe as plain data"
        raise TypeError(sentence(f"{kind(source)} in the place of the recipe", allowed))
    problems: list[Problem] = []
    files = _Files(problems)
    if isinstance(source, Mapping):
        shown, name = "<recipe>", "recipe"
        node = files.resolve(from_python(source), None)
    else:
        try:
            file = sources.open_source(source)
            node = files.load(file)
        except NotFoundError as error:
            raise RecipeError(str(error)) from None
        shown, name = file.title, re.sub(r"[^A-Za-z0-9._-]+", "-", file.path.stem).strip(".-_") or "recipe"
    node = override(node, overrides, problems)
    node = substitute(_without_notes(node), problems)
    node = tidy(node)
    assert isinstance(node.value, dict)
    problems += validate(node)
    problems += check(node)
    if problems:
        raise RecipeError(sort(problems))
    data = _in_order({"name": name, **node.plain()})
    return convert(data, Document(data, _locations(node), shown, tuple(files.read), tuple(overrides)))


class _Files:
    """Reads a recipe and everything it extends, and lays them over each other."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.read: list[SourceFile] = []
        self.bytes = 0
        self.values = 0

    def load(self, source: Source, above: tuple[Source, ...] = ()) -> Node:
        content = source.read()
        self.bytes += len(content)
        if above and self.bytes > MAX_BYTES:
            raise self.stop(f"a recipe has at most {MAX_BYTES:,} bytes with all that it extends", source)
        node = read_yaml(content, source.title)
        self.values += node.size
        if self.values > MAX_VALUES:
            raise self.stop(f"a recipe has at most {MAX_VALUES:,} values with all that it extends", source)
        node = self.resolve(node, source, above)
        self.read.append(_source_file(source, content))
        return node

    def stop(self, message: str, source: Source) -> _TooLargeError:
        """Return the error that ends the reading of any more files."""
        return _TooLargeError([*self.problems, Problem(message, location=Location(source.title, 1, 1))])

    def resolve(self, node: Node, source: Source | None, above: tuple[Source, ...] = ()) -> Node:
        """Return a file's recipe laid over those it extends."""
        if not isinstance(node.value, dict):
            if node.value is None:
                raise RecipeError(
                    Problem('the recipe is empty, allowed: a map that starts with "kw: 1"', location=node.location)
                )
            raise RecipeError(Problem(mistake(node.value, "a map of a recipe's keys"), location=node.location))
        check_version(node)
        verify(node, self.problems)
        base = Node({}, node.location)
        for path, extended in self.bases(node):
            try:
                base = merge(base, self.extend(extended, source, above), self.problems)
            except (NotFoundError, _ExtendsError) as error:
                self.problems.append(Problem(str(error), path, extended.place))
        assert isinstance(base.value, dict)
        inherited = {key: child for key, child in base.value.items() if key not in _OWN}
        own = {key: child for key, child in node.value.items() if key not in _FILE_KEYS}
        if "kw" not in own:
            # Every file says its version; the merged recipe has one in any case, so this is not said twice.
            message = f'the key "kw" is missing, the version of the language; write "kw: {VERSION}"'
            self.problems.append(Problem(message, location=node.location))
            own["kw"] = Node(VERSION)
        merged = merge(Node(inherited, node.location), Node(own, node.location), self.problems)
        return Node(merged.value, node.location)

    def bases(self, node: Node) -> list[tuple[str, Node]]:
        assert isinstance(node.value, dict)
        extends = node.value.get("extends", Node(None))
        if extends.value is None:
            return []
        several = [(f"extends[{index}]", item) for index, item in enumerate(extends.children)]
        entries = several if isinstance(extends.value, list) else [("extends", extends)]
        wrong = [
            Problem(mistake(item.plain(), "a text"), path, item.place)
            for path, item in entries
            if not isinstance(item.value, str)
        ]
        self.problems.extend(wrong[:1])
        return [] if wrong else entries

    def extend(self, entry: Node, parent: Source | None, above: tuple[Source, ...]) -> Node:
        assert isinstance(entry.value, str)
        chain = (*above, parent) if parent is not None else above
        source = sources.find_base(entry.value, parent)
        if any(source.path == other.path.resolve() for other in chain):
            way = " → ".join([*(other.name for other in chain), source.name])
            raise _ExtendsError(f"a recipe cannot extend itself: {way}")
        if len(chain) >= MAX_EXTENDS_DEPTH:
            raise _ExtendsError(f"more than {MAX_EXTENDS_DEPTH} recipes extend each other in a row")
        if len(self.read) >= MAX_FILES:
            raise self.stop(f"a recipe comes from at most {MAX_FILES} files", source)
        try:
            return self.load(source, chain)
        except _TooLargeError:
            raise
        except RecipeError as error:
            self.problems.extend(error.problems)
            return Node({})


class _TooLargeError(RecipeError):
    """A recipe past the limits, of which nothing more is read."""


class _ExtendsError(ValueError):
    """A recipe that cannot be extended from here."""


def check_version(node: Node) -> None:
    """Refuse a file of a later version of the language by that alone: its other mistakes may be none there.

    Raises:
        RecipeError: it is one.
    """
    assert isinstance(node.value, dict)
    version = node.value.get("kw", Node(VERSION))
    if isinstance(version.value, int) and version.value > VERSION:
        newer = "it is newer than this kw_lightning: pip install --upgrade kw-lightning"
        raise RecipeError(Problem(mistake(version.value, str(VERSION), hint=newer), "kw", version.place))


def _source_file(source: Source, content: bytes) -> SourceFile:
    version = None if source.package is None else version_of(source.package)
    return SourceFile(source.name, sources.sha256(content), source.package, version)


def _in_order(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys in the order of the language, whichever file they came from."""
    return {key: data[key] for key in schema()["properties"] if key in data}


def _without_notes(node: Node) -> Node:
    assert isinstance(node.value, dict)
    return Node({key: child for key, child in node.value.items() if not key.startswith("x-")}, node.location)


def _locations(node: Node) -> dict[str, Location]:
    """Return the place of every value; what a warehouse takes from `defaults` has its place there."""
    places = {path: place for path, child in node.walk() if (place := child.place) is not None}
    assert isinstance(node.value, dict)
    warehouses = node.value.get("warehouses", Node({})).value
    takers = [f"warehouses.{name}" for name in warehouses] if isinstance(warehouses, dict) else []
    for path, place in list(places.items()):
        if path.startswith("defaults."):
            for taker in (*takers, "stages"):
                places.setdefault(f"{taker}.{path.removeprefix('defaults.')}", place)
    return places
