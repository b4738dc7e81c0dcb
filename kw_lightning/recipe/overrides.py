"""`key=value` on the command line: a change to the recipe, checked like the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kw_lightning.errors import Location, Problem, RecipeError, mistake, shown
from kw_lightning.recipe import schema as language
from kw_lightning.recipe.merging import APPEND, merge
from kw_lightning.recipe.nodes import Node, join_all
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.recipe.scalars import NULLS

FILE = "<command line>"
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]{1,6})\]|\.")
_MAX_STEPS = 32
EVERY = "*"
_FIXED = ("kw", "extends", "lock")


def override(root: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    """Return a recipe with `a.b=c` laid over it, one after the other.

    `a.b+=[c]` appends to a list, `a.b[0]=c` replaces one of its values, `a.*.b=c` changes b in every map of a, and
    `a.b=null` removes the key; an empty value is a mistake, since an unset variable of the shell leaves one. The n-th
    override is line n of the file `<command line>`.

    Raises:
        RecipeError: overrides that are no list of texts.
    """
    if isinstance(overrides, str | Mapping) or not all(isinstance(text, str) for text in overrides):
        raise RecipeError(mistake(overrides, 'a list of changes, as ["train.epochs=5"]', what="the overrides"))
    for number, text in enumerate(overrides, start=1):
        try:
            root = _apply(root, text, number, problems)
        except RecipeError as error:
            problems.extend(error.problems)
    return root


def _apply(root: Node, text: str, number: int, problems: list[Problem]) -> Node:
    here = Location(FILE, number, 1)
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(Problem(mistake(text, "key=value, as train.epochs=5"), location=here))
    appends = key.endswith(APPEND)
    keys = parse_key(key.removesuffix(APPEND), here)
    if keys[0] in _FIXED:
        raise RecipeError(Problem(f"{keys[0]} can be changed in a file only", str(keys[0]), here))
    place = Location(FILE, number, len(key) + 2)
    for meant in _expanded(root, keys, here):
        node = _value(value, meant, place)
        if node.value is None and value.strip() not in NULLS:
            message = 'found no value, allowed: a value; null removes the key, "" is an empty text'
            raise RecipeError(Problem(message, join_all(meant), place))
        if appends:
            if not isinstance(node.value, list):
                node = Node([node], node.location, here)
            meant = (*meant[:-1], f"{meant[-1]}{APPEND}")
        root = _put(root, meant, node, here, problems, ())
    return root


def _expanded(root: Node, keys: tuple[str | int, ...], here: Location) -> list[tuple[str | int, ...]]:
    """Return the keys that are meant where `*` stands for every key of a map: all but the last may be one.

    Raises:
        RecipeError: there is no map, **or** an empty one.
    """
    if EVERY not in keys[:-1]:
        return [keys]
    before, after = keys[: keys.index(EVERY)], keys[keys.index(EVERY) + 1 :]
    node = root
    for key in before:
        inside = node.value
        node = (inside.get(key) if isinstance(inside, dict) and isinstance(key, str) else None) or Node(None)
    if not isinstance(node.value, dict) or not node.value:
        message = f"{EVERY} is every key of a map: found {shown(node.plain())} at {join_all(before) or 'the top'}"
        raise RecipeError(Problem(message, join_all(keys), here))
    return [meant for key in node.value for meant in _expanded(root, (*before, key, *after), here)]


def parse_key(text: str, here: Location | None = None) -> tuple[str | int, ...]:
    """Return the keys and indices of a path such as `warehouses.a.layers[0]`.

    Raises:
        RecipeError: the text is none; placed at `here`.
    """
    keys: list[str | int] = []
    position = 0
    while position < len(text) and len(keys) < _MAX_STEPS:
        match = _STEP.match(text, position)
        dot = match is not None and match.group(0) == "."
        # A dot stands between two keys only.
        if match is None or (dot and (not keys or text[position + 1 : position + 2] in ("", ".", "["))):
            break
        if not dot:
            keys.append(match.group(1) if match.group(1) is not None else int(match.group(2)))
        position = match.end()
    if position < len(text) or not keys or isinstance(keys[0], int):
        raise RecipeError(
            Problem(mistake(text, "keys as train.epochs or model.input[0]", what="the key"), location=here)
        )
    return tuple(keys)


def _value(text: str, keys: tuple[str | int, ...], location: Location) -> Node:
    """Read a value as YAML; as it stands where the schema wants a text, so that `name=1e3` needs no quotes."""
    try:
        node = _placed(read_yaml(text, FILE), location)
    except RecipeError as error:
        first = error.problems[0]
        raise RecipeError(Problem(first.message, join_all(keys), location)) from None
    part = language.at(keys)
    if part is not None and not isinstance(node.value, str | dict | list) and node.value is not None:
        wanted = language.types(part)
        if "string" in wanted and not language.accepts(part, node.value):
            return Node(text, location)
    return node


def _placed(node: Node, location: Location) -> Node:
    """Return a value read from the command line with its place there; what is inside stands at the same place."""
    if isinstance(node.value, dict):
        return Node({key: _placed(child, location) for key, child in node.value.items()}, location, location)
    if isinstance(node.value, list):
        return Node([_placed(child, location) for child in node.value], location, location)
    return Node(node.value, location, location)


def _put(
    node: Node,
    keys: tuple[str | int, ...],
    value: Node,
    here: Location,
    problems: list[Problem],
    done: tuple[str | int, ...],
) -> Node:
    key, rest = keys[0], keys[1:]
    path = join_all((*done, key))
    if isinstance(key, int):
        if not isinstance(node.value, list) or key >= len(node.value):
            what = shown(node.plain())
            raise RecipeError(Problem(f"there is no value {key} to change: found {what}", path, here))
        items = list(node.value)
        items[key] = _put(items[key], rest, value, here, problems, (*done, key)) if rest else value
        return Node(items, node.location, node.key_location)
    if not isinstance(node.value, dict):
        raise RecipeError(Problem(f'"{join_all(done)}" is no map, and has no key "{key}"', path, here))
    if not rest:
        layer = Node({key: value.moved(here)}, node.location, node.key_location)
        return Node(merge(node, layer, problems, join_all(done)).value, node.location, node.key_location)
    child = node.value.get(key) or Node({}, here, here)
    if child.value is None:
        child = Node({}, here, here)
    changed = _put(child, rest, value, here, problems, (*done, key))
    return Node({**node.value, key: changed}, node.location, node.key_location)
