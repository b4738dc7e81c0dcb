"""`kw list`: the recipes that can be used by name."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kw_lightning.cli.output import console
from kw_lightning.errors import RecipeError, did_you_mean, first_line, shown
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.recipe.sources import NotFoundError, Source, names


def list(
    pattern: Annotated[str | None, typer.Argument(help="Only names that contain this.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """List shipped recipes and those that installed packages announce, with a line each."""
    rows = [
        {"name": name, "description": describe(source), "package": source.package or "", "file": source.name}
        for name, source in names().items()
        if pattern is None or pattern in name
    ]
    if json:
        typer.echo(json_module.dumps(rows, indent=2))
        return
    if pattern is not None and not rows:
        hint = did_you_mean(pattern, names())
        typer.echo(f"no name contains {shown(pattern)}{f'; {hint}' if hint else ''}", err=True)
        return
    out = console()
    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("description")
    several = len({row["package"] for row in rows}) > 1
    if several:
        table.add_column("package", no_wrap=True)
    for row in rows:
        cells = (row["name"], row["description"], row["package"])
        table.add_row(*map(Text, cells if several else cells[:2]))
    out.print(table)


def describe(source: Source) -> str:
    """Return the first line of a recipe's own description; why not, for one that cannot be read."""
    try:
        node = read_yaml(source.read(), source.name)
    except (RecipeError, NotFoundError) as error:
        return f"({first_line(error)})"
    entry = node.value.get("description") if isinstance(node.value, dict) else None
    text = entry.value if entry is not None else None
    if not isinstance(text, str) or not text.strip():
        return ""
    line = text.strip().splitlines()[0]
    return line if line.isprintable() else shown(line)
