"""A trained network out of a Lightning checkpoint: of kw-fit, or of a LightningModule with KWCallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.callbacks.checkpoint_io import read
from kw_lightning.errors import RunError, first_line
from kw_lightning.inference.classifier import ImageClassifier
from kw_lightning.inference.saving import SavedNetwork, build_network, class_names, load_weights
from kw_lightning.planning import Plan, plan
from kw_lightning.preprocessing import CLASSES, PREPROCESSING, Preprocessing, preprocessing
from kw_lightning.recipe import load_recipe


def load_trained(path: Path, *, planned: Plan | None = None, allow_python: Sequence[str] = ()) -> ImageClassifier:
    """Return the network of a checkpoint ready to predict, see `read_trained`."""
    return ImageClassifier(read_trained(path, planned=planned, allow_python=allow_python))


def read_trained(path: Path, *, planned: Plan | None = None, allow_python: Sequence[str] = ()) -> SavedNetwork:
    """Return the network of a checkpoint with what belongs to it.

    Of a LightningModule with KWCallback the network is found by its weights' names; its recipe has to name the network
    (`model`), which KWCallback itself does not need.

    Args:
        path: the checkpoint.
        planned: the plan of its recipe, where there is one.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: a file that is no checkpoint, that has no recipe, **or** whose weights fit its recipe nowhere.
        RecipeError: a recipe that cannot be used here.
    """
    state = read(path)
    recipe = planned.recipe if planned is not None else load_recipe(_recipe_of(state, path))
    if recipe.model is None or not (recipe.model.backbone or recipe.model.layers):
        raise RunError(
            f"{path}: its recipe names no network (model.backbone), since it is the LightningModule's; "
            "load it with kw_lightning.callbacks.load_from_checkpoint(YourModule, path)"
        )
    planned = planned or plan(recipe, allow_python=allow_python)
    network = build_network(planned, allow_python=allow_python)
    load_weights(network, _weights_of(network, state, path), path)
    steps = state.get(PREPROCESSING)
    try:
        found = Preprocessing.from_dict(steps) if isinstance(steps, Mapping) else preprocessing(recipe)
    except ValueError as error:
        raise RunError(f"{path}: damaged, or not of kw-fit: {first_line(error)}") from None
    classes = state.get(CLASSES)
    names = tuple(map(str, classes)) if isinstance(classes, list) else class_names(network)
    return SavedNetwork(network.eval(), recipe, found or Preprocessing(), names, recipe.several, planned)


def _recipe_of(state: Any, path: Path) -> Mapping[str, Any]:
    """Return the recipe inside: only a map, since a text would be the name of a file of the checkpoint's choice."""
    if isinstance(state, Mapping):
        parameters = state.get("hyper_parameters")
        entries = state.get(KEY)
        found = parameters.get("recipe") if isinstance(parameters, Mapping) else None
        if (
            not isinstance(found, Mapping)
            and isinstance(entries, list)
            and len(entries) == 1
            and isinstance(entries[0], Mapping)
        ):
            found = entries[0].get("recipe")
        if isinstance(found, Mapping):
            return found
    raise RunError(f"{path}: no recipe inside; only checkpoints of kw-fit and of KWCallback can be used here")


def _weights_of(network: nn.Module, state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the weights under the network's own names, whatever the LightningModule calls the network."""
    weights = state.get("state_dict")
    if not isinstance(weights, Mapping):
        raise RunError(f"{path}: no weights inside")
    own = network.state_dict().keys()
    first = next(iter(own))
    prefixes = [key.removesuffix(first) for key in weights if key == first or key.endswith(f".{first}")]
    fitting = [prefix for prefix in prefixes if all(f"{prefix}{key}" in weights for key in own)]
    if len(fitting) != 1:
        where = f"{len(fitting)} times" if fitting else "nowhere"
        raise RunError(f"{path}: the network of the recipe inside is {where} among the weights, and once is needed")
    return {key: weights[f"{fitting[0]}{key}"] for key in own}
