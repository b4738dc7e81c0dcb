"""Going on with a run: its weights have to fit, some settings may change, and the lock keeps the history of changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from kw_lightning.callbacks.layout import misfits
from kw_lightning.errors import RunError, listed
from kw_lightning.fit.changes import Relay, changed, in_words, is_relaid
from kw_lightning.fit.folder import RECIPE_FILE, RunFolder, folder_of
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.starting import Start
from kw_lightning.recipe import lock_text
from kw_lightning.recipe.types import Recipe

log = logging.getLogger(__name__)


def prepare(recipe: Recipe, module: Classifier, begun: Start) -> list[Callback]:
    """Check what a run goes on from.

    Returns:
        Callbacks for what it does otherwise than before.

    Raises:
        RunError: weights of another network, **or** a change that a resume cannot make.
    """
    assert begun.state is not None
    assert begun.checkpoint is not None
    check_fits(module, begun.state, begun.checkpoint)
    changes = changed(begun.state, begun.checkpoint, recipe)
    if not changes:
        return [Relock(recipe, begun.folder, [])]
    step = begun.state["global_step"]
    log.warning("resumed after step %d with other settings: %s", step, in_words(changes))
    entry = {"step": step, "changed": [in_words([change]) for change in changes]}
    more: list[Callback] = [Relock(recipe, begun.folder, [*lock_history(folder_of(begun.checkpoint)), entry])]
    return [*more, Relay()] if is_relaid(changes) else more


class Relock(Callback):
    """Writes the lock of a resumed run when it trains: a lock holds no value that was not used, and keeps its history.

    Args:
        recipe: the recipe of the resumed run.
        folder: its folder.
        history: of each resume with other settings, the step and what was changed; the lock stays without any.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, history: list[dict[str, Any]]) -> None:
        self.recipe, self.folder, self.history = recipe, folder, history

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, in the first process."""
        if trainer.is_global_zero and (self.history or not (self.folder.path / RECIPE_FILE).exists()):
            self.folder.write(RECIPE_FILE, lock_text(self.recipe, self.history))


def lock_history(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what earlier resumes of a run changed; none where its lock cannot be read."""
    try:
        lock = yaml.safe_load((folder.path / RECIPE_FILE).read_text(encoding="utf-8"))["lock"]
        return list(lock.get("history", []))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []


def check_fits(module: Classifier, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Compare a checkpoint with the network that is to go on from it.

    Raises:
        RunError: it is another network's.
    """
    found = misfits(module, state["state_dict"])
    if found:
        raise RunError(
            f"{checkpoint} is of another network than the recipe's: {listed(found, between='; ')}. "
            "Train the recipe in a new folder"
        )
