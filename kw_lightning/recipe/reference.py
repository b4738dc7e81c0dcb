"""The reference of the language, generated from its schema.

To bring it up to date: `python -m kw_lightning.recipe.reference recipes/README.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kw_lightning.recipe.schema import Schema, branches, in_words, resolve, schema

START = "<!-- From here on generated: python -m kw_lightning.recipe.reference recipes/README.md -->"


def reference() -> str:
    """Return the reference as Markdown: one table for each map of the language, shared ones once."""
    return "\n".join(_Reference().sections()) + "\n"


def updated(text: str) -> str:
    """Return a Markdown file with the reference behind its marker brought up to date."""
    before, marker, _ = text.partition(START)
    if not marker:
        raise ValueError(f"the file has no line {START}")
    return f"{before}{START}\n\n{reference()}"


class _Reference:
    """Walks through the schema breadth first, so that outer maps come before inner ones."""

    def __init__(self) -> None:
        self.queue: list[tuple[str, Schema, str]] = [("recipe", schema(), "The whole file")]
        self.titles: dict[str, str] = {}

    def sections(self) -> Iterator[str]:
        while self.queue:
            path, part, title = self.queue.pop(0)
            yield f"### {title}\n"
            if part.get("description"):
                yield f"{part['description']}\n"
            yield "| key | value | default | |"
            yield "| --- | --- | --- | --- |"
            for key, child in part["properties"].items():
                yield self.row(path, key, child)
            yield ""

    def row(self, path: str, key: str, child: Schema) -> str:
        part = resolve(child)
        default = f"`{_literal(part['default'])}`" if "default" in part else ""
        description = part.get("description", "")
        examples = part.get("examples")
        if examples and not any("enum" in branch for branch in branches(part)):
            description += f" Such as {', '.join(f'`{_literal(example)}`' for example in examples)}."
        cells = (f"`{key}`", self.value(path, key, child), default, description)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def value(self, path: str, key: str, child: Schema) -> str:
        """Return what a key's value may be; a map gets a section of its own, to which this links."""
        phrases = []
        for branch in branches(child):
            inner, title = _map_inside(branch, f"{path}.{key}".removeprefix("recipe."))
            if inner is None:
                phrases.append(_words(branch))
                continue
            name = self.section(inner, title)
            if branch["type"] == "array":
                kind = "a list, each a text or" if "anyOf" in resolve(branch["items"]) else "a list, each"
            elif inner is not branch:
                kind = "names, each with"
            else:
                kind = "one of" if inner.get("maxProperties") == 1 else "a map:"
            phrases.append(f"{kind} [{name}](#{_anchor(name)})")
        return " or ".join(dict.fromkeys(phrases))

    def section(self, part: Schema, title: str) -> str:
        """Return the title of a map's section, queued when it is new: maps with the same keys share one."""
        identity = json.dumps(part["properties"], sort_keys=True)
        if identity not in self.titles:
            self.titles[identity] = title
            self.queue.append((title, part, title))
        return self.titles[identity]


def _map_inside(branch: Schema, title: str) -> tuple[Mapping[str, Any] | None, str]:
    """Return the map with known keys that a value is, or that a list or map of values holds."""
    if branch.get("properties"):
        return branch, title
    inside = branch.get("items") or branch.get("additionalProperties")
    if isinstance(inside, dict):
        for inner in branches(inside):
            if inner.get("properties") and "guide" not in inner:  # layers have a guide of their own
                return inner, f"{title}.NAME" if branch["type"] == "object" else f"{title}[…]"
    return None, title


def _words(branch: Schema) -> str:
    if "enum" in branch or "const" in branch:
        return ", ".join(f"`{_literal(value)}`" for value in branch.get("enum", [branch.get("const")]))
    if branch.get("type") == "array" and isinstance(branch.get("items"), dict):
        items = in_words(branch["items"])
        return f"{in_words(branch)}, each {items}"
    return in_words(branch)


def _literal(value: Any) -> str:
    """Return a value as one writes it in a recipe."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_literal(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
