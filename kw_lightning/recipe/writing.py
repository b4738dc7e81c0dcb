"""Plain data → YAML that this language reads back as the same data, with a comment behind any line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kw_lightning.recipe.nodes import join
from kw_lightning.recipe.scalars import read_plain

_WIDTH = 100
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+*?$ ")
_NOT_FIRST = frozenset("-?*+. ")


def to_yaml(data: Mapping[str, Any], comment: Callable[[str], str | None] | None = None) -> str:
    """Return a map as YAML.

    Args:
        data: maps, lists and scalars.
        comment: key path → what stands behind its line, None for nothing.
    """
    lines = list(_map(data, 0, ""))
    width = max((len(line) for line, _ in lines if len(line) <= 80), default=0)
    text = []
    for line, path in lines:
        note = comment(path) if comment is not None else None
        text.append(f"{line:<{width}}  # {note}" if note else line)
    return "\n".join(text) + "\n"


def _map(data: Mapping[str, Any], indent: int, path: str) -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        yield from _entry(f"{' ' * indent}{_scalar(key)}:", value, indent + 2, join(path, key))


def _list(data: list[Any], indent: int, path: str) -> Iterator[tuple[str, str]]:
    for index, value in enumerate(data):
        inner = join(path, index)
        if isinstance(value, Mapping) and value:
            # The first key stands behind the dash.
            lines = list(_map(value, indent + 2, inner))
            yield f"{' ' * indent}- {lines[0][0].lstrip()}", lines[0][1]
            yield from lines[1:]
        else:
            yield from _entry(f"{' ' * indent}-", value, indent + 2, inner)


def _entry(head: str, value: Any, indent: int, path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, Mapping | list) or not value or _fits(value, len(head)):
        yield f"{head} {_flow(value)}", path
        return
    yield head, path
    yield from _map(value, indent, path) if isinstance(value, Mapping) else _list(value, indent, path)


def _fits(value: Any, indent: int) -> bool:
    """Return whether a value is a list of scalars that goes into one line."""
    if isinstance(value, Mapping) or any(isinstance(child, Mapping | list) and child for child in value):
        return False
    return indent + len(_flow(value)) <= _WIDTH


def _flow(value: Any) -> str:
    """Return a scalar, a list of scalars or an empty map in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "{}" if isinstance(value, Mapping) else _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    plain = text and set(text) <= _PLAIN and text[0] not in _NOT_FIRST and not text.endswith(" ")
    if plain and isinstance(_read(text), str):
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    """Return a character inside double quotes."""
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _read(text: str) -> Any:
    try:
        return read_plain(text)
    except ValueError:
        return None
