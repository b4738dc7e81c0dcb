"""What differs between two recipes, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kw_lightning.recipe.nodes import join

ABSENT = object()
"""The value of a key that one of two recipes does not have."""


@dataclass(frozen=True)
class Difference:
    """A key with another value in each of two recipes; `ABSENT` where one does not have it."""

    path: str
    before: Any
    after: Any


def differences(before: Any, after: Any, path: str = "") -> Iterator[Difference]:
    """Yield the keys in which plain data differs, in the order of the first, then of the second.

    Maps are compared key by key; lists value by value when they are as long, else as a whole. 1 and 1.0 are the same.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            yield from differences(before.get(key, ABSENT), after.get(key, ABSENT), join(path, key))
    elif _alike(before, after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, join(path, index))
    elif type(before) is bool or type(after) is bool:
        if before is not after:
            yield Difference(path, before, after)
    elif before != after:
        yield from _parts(before, after, path)


def _parts(before: Any, after: Any, path: str) -> Iterator[Difference]:
    """Yield a map that is only in one recipe key by key, and everything else as a whole."""
    for value, other in ((before, after), (after, before)):
        if isinstance(value, Mapping) and value and other is ABSENT:
            for key, item in value.items():
                pair = (item, ABSENT) if value is before else (ABSENT, item)
                yield from differences(*pair, join(path, key))
            return
    yield Difference(path, before, after)


def _alike(before: Any, after: Any) -> bool:
    return isinstance(before, list) and isinstance(after, list) and len(before) == len(after)
