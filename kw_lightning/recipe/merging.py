"""One recipe over another: maps merge, everything else replaces, `null` removes a key, `layers+:` appends.

Each value keeps the place it was written at, so a mistake is reported in the file that made it.
"""

from __future__ import annotations

from kw_lightning.errors import Problem, mistake
from kw_lightning.recipe.nodes import Node, join

APPEND = "+"


def merge(base: Node, over: Node, problems: list[Problem], path: str = "") -> Node:
    """Return `over` laid over `base`.

    Args:
        base, over: maps of a recipe.
        problems: what cannot be appended is added here.
        path: their key path.
    """
    assert isinstance(base.value, dict)
    assert isinstance(over.value, dict)
    merged = dict(base.value)
    # What is replaced first is then appended to, whichever stands first in the file.
    for key, child in sorted(over.value.items(), key=lambda item: item[0].endswith(APPEND)):
        inner = join(path, key)
        name = key.removesuffix(APPEND)
        if key.endswith(APPEND) and name:
            merged[name] = _append(merged.get(name), child, problems, inner)
        elif child.value is None and key in merged:
            del merged[key]
        elif isinstance(child.value, dict):
            before = merged.get(key)
            inherited = before if before is not None and isinstance(before.value, dict) else Node({})
            merged[key] = merge(inherited, child, problems, inner)
        else:
            merged[key] = child
    return Node(merged, over.location, over.key_location)


def _append(base: Node | None, over: Node, problems: list[Problem], path: str) -> Node:
    if not isinstance(over.value, list):
        problems.append(Problem(mistake(over.plain(), "a list of what is appended"), path, over.place))
        return base or Node([], over.location, over.key_location)
    if base is None:
        return over
    if not isinstance(base.value, list):
        problems.append(Problem("there is no list to append to", path, over.key_location or over.place))
        return base
    return Node([*base.value, *over.value], base.location, over.key_location)
