"""What the shell offers after a tab: names of recipes, and keys and values of overrides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import typer

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.overrides import parse_key
from kw_lightning.recipe.schema import at, branches, key_paths
from kw_lightning.recipe.sources import SUFFIXES, names

_NOT_OVERRIDDEN = ("kw", "extends", "lock")


def complete_recipe(incomplete: str) -> list[str]:
    """Return the names of recipes, and the recipe files and folders of the folder that is being typed."""
    folder = Path(incomplete).expanduser() if incomplete.endswith(os.sep) else Path(incomplete).expanduser().parent
    files = []
    if folder.is_dir():
        for path in folder.iterdir():
            shown = incomplete[: incomplete.rfind(os.sep) + 1] + path.name
            if path.is_dir() and not path.name.startswith("."):
                files.append(shown + os.sep)
            elif path.suffix in SUFFIXES:
                files.append(shown)
    return sorted(name for name in (*names(), *files) if name.startswith(incomplete))


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the keys that may follow, and after `key=` the values to choose from."""
    key, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(key) if f"{key}={value}".startswith(incomplete)]
    warehouses = _warehouses(ctx.params.get("recipe"))
    return sorted(f"{key}=" for key in _keys(warehouses) if key.startswith(incomplete))


def _keys(warehouses: list[str]) -> Iterator[str]:
    for paths in key_paths().values():
        for path in paths:
            if path.partition(".")[0] in _NOT_OVERRIDDEN:
                continue
            if ".NAME" in path:
                yield from (path.replace(".NAME", f".{name}") for name in warehouses)
            else:
                yield path


def _warehouses(recipe: object) -> list[str]:
    """Return the warehouses of the recipe that stands before on the command line."""
    if not isinstance(recipe, str):
        return []
    try:
        return [warehouse.name for warehouse in load_recipe(recipe).warehouses]
    except RecipeError:
        return []


def _values(key: str) -> list[str]:
    try:
        part = at(parse_key(key))
    except ValueError:
        return []
    values: list[str] = []
    for branch in branches(part) if part is not None else ():
        values += [str(value) for value in branch.get("enum", ())]
        if branch.get("type") == "boolean":
            values += ["true", "false"]
    return values
