"""Values and names as messages show them: short, in one line, and without characters that move a terminal's cursor."""

from __future__ import annotations

import json

_LENGTH = 60


def found(value: object) -> str:
    """Return a value as a message shows it: a text in quotes, a list by its length, a map by its keys."""
    match value:
        case None:
            return "nothing"
        case dict():
            keys = ", ".join(key if key.isprintable() else json.dumps(key) for key in list(value)[:_LENGTH])
            return f"a map with {_shorten(keys)}" if value else "an empty map"
        case list():
            return f"a list of {len(value):,} {'value' if len(value) == 1 else 'values'}" if value else "an empty list"
        case str():
            return json.dumps(_shorten(value), ensure_ascii=not value.isprintable())
        case _:
            return json.dumps(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _LENGTH else text[:_LENGTH] + "…"
