"""The recipe language: YAML with positions, inheritance, overrides and locks, in; frozen dataclasses, out.

Nothing here imports torch, and nothing that a recipe names is imported or run.
"""

from kw_lightning.recipe.loading import load_recipe
from kw_lightning.recipe.locking import lock_text
from kw_lightning.recipe.types import Recipe

__all__ = ["Recipe", "load_recipe", "lock_text"]
