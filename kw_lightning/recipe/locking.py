"""A lock: one resolved file, with a hash of its content, the versions it was made with and the files it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kw_lightning.errors import Problem
from kw_lightning.recipe.nodes import Node
from kw_lightning.recipe.types import Recipe
from kw_lightning.recipe.variables import escape
from kw_lightning.recipe.writing import to_yaml
from kw_lightning.versions import package_versions

MARK = "resolved and locked by `kw lock`"
"""What the first line of a lock says."""


def lock_text(recipe: Recipe, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a recipe as one resolved file that refuses to be changed by accident.

    Args:
        recipe: the recipe.
        history: what a run that was resumed changed, and after which step.
    """
    data = escape(recipe.document.data)
    lock: dict[str, Any] = {"content": content_hash(data), "versions": package_versions()}
    lock["sources"] = [
        {"file": source.file, "sha256": source.sha256, **({"version": source.version} if source.version else {})}
        for source in recipe.document.sources
    ]
    if recipe.document.overrides:
        lock["overrides"] = list(recipe.document.overrides)
    if history:
        lock["history"] = [dict(entry) for entry in history]
    header = f"# {recipe.name}, {MARK}: a changed copy is refused; change its sources instead.\n"
    return header + to_yaml({**data, "lock": lock})


def content_hash(data: Any) -> str:
    """Return the SHA-256 of a recipe's plain data, which does not depend on how its YAML is written."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def verify(node: Node, problems: list[Problem]) -> None:
    """Add a problem when a file has a lock that does not fit the rest of it."""
    if not isinstance(node.value, dict) or "lock" not in node.value:
        return
    lock = node.value["lock"]
    content = lock.value.get("content", Node(None)) if isinstance(lock.value, dict) else Node(None)
    if not isinstance(content.value, str):
        problems.append(Problem('the key "content" is missing; `kw lock` writes it', "lock", lock.place))
        return
    actual = content_hash({key: child.plain() for key, child in node.value.items() if key != "lock"})
    if content.value != actual:
        message = (
            f"the file was changed after it was locked: found the content hash {content.value[:12]}…, "
            f"of what stands here it is {actual[:12]}…; lock its sources again, or remove the key lock"
        )
        problems.append(Problem(message, "lock.content", content.place))
