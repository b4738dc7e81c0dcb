"""`kw diff`: two recipes and their plans side by side."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kw_lightning.cli.arguments import JsonOption, package_option
from kw_lightning.cli.completion import complete_recipe
from kw_lightning.cli.output import console
from kw_lightning.recipe import Recipe, load_recipe
from kw_lightning.recipe.comparison import ABSENT, Difference, differences

_NAMES = ("name", "description")


def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A recipe, by file or by name.", autocompletion=complete_recipe)
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="The one to compare it with.", autocompletion=complete_recipe)
    ],
    network: Annotated[bool, typer.Option(help="Compare the plans, too: cells, parameters, multiply-adds.")] = True,
    json: JsonOption = False,
    allow_python: Annotated[list[str] | None, package_option("Let the recipes name things")] = None,
) -> None:
    """Show what changes from recipe A to recipe B: keys, and what that does to the network."""
    recipes = [load_recipe(first), load_recipe(second)]
    before, after = ({k: v for k, v in recipe.document.data.items() if k not in _NAMES} for recipe in recipes)
    changes = list(differences(before, after))
    figures = _figures(recipes, tuple(allow_python or ())) if network else None
    if json:
        keys = [{"key": c.path, "a": _json(c.before), "b": _json(c.after)} for c in changes]
        rows = None if figures is None else [dict(zip(("what", "a", "b"), row, strict=True)) for row in figures]
        typer.echo(json_module.dumps({"recipe": keys, "plan": rows}, indent=2))
        return
    titles = [recipe.name for recipe in recipes]
    if titles[0] == titles[1]:
        titles = [first, second]
    _print_changes(changes, titles)
    if figures is not None:
        _print_figures(figures, titles)


def _figures(recipes: Sequence[Recipe], allow_python: Sequence[str]) -> list[tuple[Any, ...]] | None:
    """Return the figures that are not the same in the plans of recipes; None unless all have a network."""
    if not all(recipe.model and (recipe.model.backbone or recipe.model.layers) for recipe in recipes):
        return None
    # slow to import: torch
    from kw_lightning.planning import plan
    from kw_lightning.planning.comparison import different_figures
    from kw_lightning.recipe.classes import USUAL, with_classes

    plans = [plan(with_classes(recipe, USUAL), allow_python=allow_python) for recipe in recipes]
    return different_figures(*plans)


def _print_changes(changes: Sequence[Difference], titles: Sequence[str]) -> None:
    out = console()
    if not changes:
        out.print("The recipes say the same.")
        return
    table = _table("key", titles)
    for change in changes:
        table.add_row(*map(Text, (change.path, _shown(change.before), _shown(change.after))))
    out.print(table)


def _print_figures(rows: Sequence[tuple[Any, ...]], titles: Sequence[str]) -> None:
    out = console()
    if not rows:
        out.print("\nThe plans have the same figures.")
        return
    table = _table("plan", titles)
    table.add_column("change", justify="right")
    for what, old, new in rows:
        numbers = isinstance(old, int) and isinstance(new, int)
        change = f"{new - old:+,} (× {new / max(old, 1):.3g})" if numbers else ""
        cells = [f"{value:,}" if isinstance(value, int) else str(value or "—") for value in (old, new)]
        table.add_row(*map(Text, (what, *cells, change)))
    out.print()
    out.print(table)


def _table(title: str, recipes: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD if console().is_terminal else None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for recipe in recipes:
        table.add_column(recipe, justify="right" if title == "plan" else "left")
    return table


def _shown(value: Any) -> str:
    return "—" if value is ABSENT else json_module.dumps(value, ensure_ascii=True)


def _json(value: Any) -> Any:
    return None if value is ABSENT else value
