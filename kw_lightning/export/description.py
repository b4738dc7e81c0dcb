"""What an exported file says of itself: recipe, preprocessing and class names, as one text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from kw_lightning.errors import RunError, first_line
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.variables import escape

KEY = "kw_lightning"
"""Of the file's metadata."""


def describe(saved: SavedNetwork) -> str:
    """Return everything but the network as JSON."""
    data = escape(dict(saved.recipe.document.data))
    return json.dumps(
        {
            "recipe": data,
            "recipe_hash": content_hash(data),
            "preprocessing": saved.preprocessing.to_dict(),
            "classes": list(saved.classes),
            "several": saved.several,
        },
        ensure_ascii=False,
        default=str,
    )


def described(text: str | None, network: nn.Module, file: str) -> SavedNetwork:
    """Return a network with what its file says of it.

    Raises:
        RunError: the file says nothing, **or** what this package does not write.
        RecipeError: a recipe that cannot be used here.
    """
    if not text:
        raise RunError(f"{file}: no metadata of kw_lightning inside; only what `kw export` wrote can be used here")
    try:
        data: Mapping[str, Any] = json.loads(text)
        recipe = data["recipe"]
        if not isinstance(recipe, Mapping) or not isinstance(data["classes"], list):
            raise ValueError("recipe or classes")
        steps = Preprocessing.from_dict(data["preprocessing"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file}: its metadata is damaged, or not of kw_lightning: {first_line(error)}") from error
    return SavedNetwork(
        network, load_recipe(recipe), steps, tuple(map(str, data["classes"])), bool(data.get("several"))
    )
