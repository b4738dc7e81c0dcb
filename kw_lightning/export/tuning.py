"""A folded network trained on for a few epochs: it gets used to kernels that no longer follow the sample."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import seed_everything

from kw_lightning.callbacks.finite import FiniteLoss
from kw_lightning.export.calibration import images_of
from kw_lightning.fit.failures import readable_failures
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.quiet import quiet
from kw_lightning.fit.trainer import plain_trainer
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe, Train

SHARE = 10
"""The learning rate is the recipe's, divided by it: the network has been trained."""
OF_LONG_RUNS = ("max_steps", "freeze", "freeze_epochs", "ema", "checkpoint_every", "nodes", "strategy", "compile")
"""Keys of the training that a few more epochs on one device do without."""

OF_LAYERS = ("groups", "no_decay")
"""Keys of the optimizer that name layers, which folding may have replaced."""


def tune(folded: SavedNetwork, epochs: int, *, allow_python: Sequence[str] = ()) -> SavedNetwork:
    """Return a copy of a static network, trained for some epochs on its recipe's training images.

    Optimizer, loss and augmentation are the recipe's; the learning rate falls along a cosine from a tenth of the
    recipe's.

    Args:
        folded: see `fold`; it stays as it is.
        epochs: how many.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: the recipe names no images, **or** they are not there.
        NonFiniteError: a loss that is infinite or not a number.
    """
    recipe = _short_training(folded.recipe, epochs)
    seed_everything((recipe.train or Train()).seed, workers=True, verbose=False)
    with readable_failures(), quiet():
        module = Classifier(recipe, allow_python=allow_python, pretrained=False)
        module.network.load_state_dict(folded.network.state_dict())
        trainer = plain_trainer(
            recipe,
            callbacks=[FiniteLoss()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(module, images_of(folded, allow_python))
    network = copy.deepcopy(folded.network).cpu()
    network.load_state_dict(module.network.cpu().state_dict())
    return replace(folded, network=network.eval())


def _short_training(recipe: Recipe, epochs: int) -> Recipe:
    """Return a recipe whose training is the fine-tuning."""
    data = dict(recipe.document.data)
    train = {key: value for key, value in data.get("train", {}).items() if key not in OF_LONG_RUNS}
    lr = (recipe.train or Train()).optimizer.lr / SHARE
    kept = {key: value for key, value in train.get("optimizer", {}).items() if key not in OF_LAYERS}
    optimizer: dict[str, Any] = {**kept, "lr": lr}
    changed = {"epochs": epochs, "devices": 1, "optimizer": optimizer, "schedule": {"name": "cosine"}}
    return load_recipe({**data, "train": {**train, **changed}})
