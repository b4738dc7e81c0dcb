"""Liberties that a recipe may take: keys without a value, and `1e5` for a whole number."""

from __future__ import annotations

from kw_lightning.recipe import schema as language
from kw_lightning.recipe.limits import MAX_DIGITS
from kw_lightning.recipe.nodes import Node


def tidy(node: Node, part: language.Schema | None = None) -> Node:
    """Return a recipe without the known keys that have no value, and with `1e5` as 100000 where it must be whole.

    `train:` with nothing behind it is not there. Where the schema leaves values open, as in `model.args`, nothing
    (null) is a value like others.
    """
    part = language.schema() if part is None else part
    if isinstance(node.value, dict):
        kept = {}
        for key, child in node.value.items():
            inner = next(language.children(part, key), None)
            if child.value is None and inner is not None and language.types(inner):
                continue
            kept[key] = tidy(child, inner) if inner is not None else child
        return Node(kept, node.location, node.key_location)
    if isinstance(node.value, list):
        inner = next(language.children(part, 0), None)
        items = [tidy(child, inner) for child in node.value] if inner is not None else node.value
        return Node(items, node.location, node.key_location)
    if isinstance(node.value, float) and node.value.is_integer() and abs(node.value) < 10**MAX_DIGITS:
        types = language.types(part)
        if "integer" in types and "number" not in types:
            return Node(int(node.value), node.location, node.key_location)
    return node
