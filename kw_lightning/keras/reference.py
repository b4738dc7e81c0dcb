"""The vocabulary as a table of Markdown, made of the layers themselves.

To bring that of `recipes/keras/README.md` up to date: `python -m kw_lightning.keras.reference`.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from kw_lightning.keras import layers as _vocabulary  # noqa: F401 -- registers the layers
from kw_lightning.keras.layer import LAYERS, Layer
from kw_lightning.resources import shipped

START = "<!-- layers: begin; made by python -m kw_lightning.keras.reference -->"
END = "<!-- layers: end -->"


def vocabulary_table() -> str:
    """Return a row for each layer: its name, its arguments with their defaults, and what it does."""
    lines = ["| layer | arguments | what it does |", "| --- | --- | --- |"]
    for name, kind in LAYERS.items():
        fields = sorted(kind.arguments().values(), key=lambda field: field.default is not dataclasses.MISSING)
        arguments = ", ".join(map(_argument, fields))
        text = first_paragraph(kind).replace("|", "\\|")
        lines.append(f"| {name} | {arguments} | {text} |")
    return "\n".join(lines)


def _argument(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return f"**{field.name}**"
    default = field.default
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
    return f"{field.name} = {text}"


def first_paragraph(kind: type[Layer]) -> str:
    """Return what a layer does, in one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def updated(text: str) -> str:
    """Return a page with the table between its marks brought up to date."""
    before, after = text.partition(START)[0], text.partition(END)[2]
    return f"{before}{START}\n{vocabulary_table()}\n{END}{after}"


def main() -> None:
    """Bring the shipped page up to date."""
    file = Path(str(shipped("recipes"))) / "keras" / "README.md"
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
