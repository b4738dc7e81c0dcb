"""Where the shipped schemas and recipes lie, in a checkout and in an installed wheel."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable


def shipped(folder: str) -> Traversable:
    """Return the shipped folder `schemas` or `recipes`.

    A wheel carries both inside the package; in a checkout they stand beside it.
    """
    inside = files("kw_lightning") / folder
    if inside.is_dir():
        return inside
    return Path(str(files("kw_lightning"))).parent / folder
