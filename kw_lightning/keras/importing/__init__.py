"""From Keras: what `model.to_json()` and `model.save()` of Keras 3 write → a recipe, and the weights beside it."""

from kw_lightning.keras.importing.archive import model_json, open_weights
from kw_lightning.keras.importing.conversion import Imported, import_keras, import_model
from kw_lightning.keras.importing.weights import load_weights
from kw_lightning.keras.importing.writing import recipe_text

__all__ = ["Imported", "import_keras", "import_model", "load_weights", "model_json", "open_weights", "recipe_text"]
