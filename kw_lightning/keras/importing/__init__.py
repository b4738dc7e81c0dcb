"""From Keras: what `model.to_json()` of Keras 3 writes → a recipe."""

from kw_lightning.keras.importing.conversion import import_keras
from kw_lightning.keras.importing.writing import recipe_text

__all__ = ["import_keras", "recipe_text"]
