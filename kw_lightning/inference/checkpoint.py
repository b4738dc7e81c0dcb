"""A trained network out of a Lightning checkpoint: of kw-fit, or of a LightningModule with KWCallback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kw_lightning.callbacks.checkpoint_io import read
from kw_lightning.errors import RunError
from kw_lightning.fit.evaluation import check_layout, trained_preprocessing
from kw_lightning.fit.foreign import NETWORK, as_of_kw_fit, guessed_preparation, is_foreign
from kw_lightning.inference.classifier import ImageClassifier
from kw_lightning.inference.saving import SavedNetwork, build_network, class_names, load_weights
from kw_lightning.planning import Plan, plan
from kw_lightning.preprocessing import CLASSES, Preprocessing, preprocessing
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

log = logging.getLogger(__name__)


def load_trained(
    path: Path,
    *,
    planned: Plan | None = None,
    overrides: Sequence[str] = (),
    classes: Sequence[str] = (),
    allow_python: Sequence[str] = (),
) -> ImageClassifier:
    """Return the network of a checkpoint ready to predict, see `read_trained`."""
    trained = read_trained(path, planned=planned, overrides=overrides, classes=classes, allow_python=allow_python)
    return ImageClassifier(trained)


def read_trained(
    path: Path,
    *,
    planned: Plan | None = None,
    overrides: Sequence[str] = (),
    classes: Sequence[str] = (),
    allow_python: Sequence[str] = (),
) -> SavedNetwork:
    """Return the network of a checkpoint with what belongs to it.

    Of a LightningModule with KWCallback the network is found by its layers' names; its recipe has to name the network
    (`model`), which KWCallback itself does not need, or `overrides` name it.

    Args:
        path: the checkpoint.
        planned: the plan of its recipe, where there is one.
        overrides: changes to the recipe inside, as `data.eval.mean=[0.5]`.
        classes: names of the network's outputs, in place of those inside.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: a file that is no checkpoint, that has no recipe, whose weights fit its recipe nowhere, **or** another
            number of names than of outputs.
        RecipeError: a recipe or an override that cannot be used here.
    """
    state = read(path)
    foreign = is_foreign(state)
    if foreign:
        state, overrides = as_of_kw_fit(state, path, overrides, allow_python=allow_python), ()
    recipe = planned.recipe if planned is not None else load_recipe(_recipe_of(state, path), overrides)
    planned = planned or plan(recipe, allow_python=allow_python)
    network = build_network(planned, allow_python=allow_python)
    load_weights(network, _weights_of(state, path), path)
    check_layout(state, path, network)
    meant = preprocessing(recipe)
    steps = trained_preprocessing(state, path, overrides) or meant
    if steps is not None and steps.channels is None and meant is not None:
        steps = replace(steps, channels=meant.channels)
    names = state.get(CLASSES)
    outputs = class_names(network)
    if classes and len(classes) != len(outputs):
        raise RunError(f"{path}: {len(classes)} names of classes are given, and the network has {len(outputs)} outputs")
    if foreign:
        _tell_what_is_missing(state, recipe, steps, classes, path)
    named = classes or (names if isinstance(names, list) else outputs)
    return SavedNetwork(
        network.eval(), recipe, steps or Preprocessing(), tuple(map(str, named)), recipe.several, planned
    )


def _tell_what_is_missing(
    state: Mapping[str, Any], recipe: Recipe, steps: Preprocessing | None, classes: Sequence[str], path: Path
) -> None:
    """Say what a LightningModule's checkpoint does not say, what is done in its place, and how it is given.

    Raises:
        RunError: nothing is known of how images are prepared.
    """
    guessed = guessed_preparation(state, recipe, steps)
    how = "data.name and data.eval (kw predict with --set before each)"
    if guessed and steps is None:
        raise RunError(f"{path}: it does not say how images are prepared: give it, by {how}")
    missing = [f"{guessed}: {how}"] if guessed else []
    if not classes and not isinstance(state.get(CLASSES), list):
        missing.append("the names of the classes, so they are numbers or ImageNet's: --classes FILE, a name a line")
    if missing:
        log.warning("%s does not say %s", path, "; nor ".join(missing))


def _recipe_of(state: Any, path: Path) -> Mapping[str, Any]:
    """Return the recipe inside: only a map, since a text would be the name of a file of the checkpoint's choice."""
    parameters = state.get("hyper_parameters") if isinstance(state, Mapping) else None
    found = parameters.get("recipe") if isinstance(parameters, Mapping) else None
    if not isinstance(found, Mapping):
        raise RunError(f"{path}: no recipe inside; only checkpoints of kw-fit and of KWCallback can be used here")
    return found


def _weights_of(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the weights under the network's own names."""
    weights = state.get("state_dict")
    if not isinstance(weights, Mapping):
        raise RunError(f"{path}: no weights inside")
    return {str(key).removeprefix(NETWORK): value for key, value in weights.items()}
