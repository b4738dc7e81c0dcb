"""What a resumed run may change, key by key; any other change takes a new run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from json import dumps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kw_lightning.errors import RecipeError, RunError, argument, listed
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.comparison import ABSENT, Difference, differences
from kw_lightning.recipe.schema import at
from kw_lightning.recipe.types import Document, Recipe, Train

RELAID = ("train.epochs", "train.max_steps", "train.optimizer.lr", "train.optimizer.weight_decay", "train.schedule*")
"""The learning rate is laid out anew for the whole run, and goes on from where the run is."""
APPLIED = (
    *("train.loss*", "train.class_weights*", "train.distill*"),
    *("train.label_smoothing", "train.mixup", "train.cutmix", "train.gradient_clip", "train.monitor"),
    "callbacks*",
    *("train.early_stop*", "trainer.gradient_clip_algorithm", "trainer.limit_val_batches", "trainer.max_time"),
    *("trainer.check_val_every_n_epoch", "trainer.min_epochs", "trainer.min_steps"),
    *("temperature*", "data.train.rand_augment*", "data.train.random_erasing*", "data.train.noise", "data.train.shift"),
    *("train.accelerator", "train.devices", "train.nodes", "train.strategy", "train.precision"),
)
"""Holds from the next step on."""
FREE = (
    *("kw", "name", "description", "engine", "epilogue", "log*", "train.checkpoint_every*", "train.compile"),
    *("train.deterministic", "train.channels_last"),
    *("data.workers", "data.root", "data.eval_batch_size", "data.test"),
    *("trainer.benchmark", "trainer.detect_anomaly", "trainer.profiler", "trainer.inference_mode"),
    *("trainer.limit_test_batches", "trainer.limit_predict_batches", "trainer.enable_autolog_hparams"),
)
"""Has no part in what is computed, but for rounding."""


def changed(state: Mapping[str, Any], checkpoint: Path, recipe: Recipe) -> list[Difference]:
    """Return the keys that a resumed run changes.

    Args:
        state: the checkpoint.
        checkpoint: its file, for messages.
        recipe: what the run is to go on with.

    Raises:
        RunError: a key that a resume cannot change, **or** an end before the place where the run is.
    """
    found = list(_differences(state["hyper_parameters"]["recipe"], recipe))
    refused = [change for change in found if not _matches(change.path, (*RELAID, *APPLIED, *FREE))]
    if refused:
        named = listed([in_words([change]) for change in refused])
        raise RunError(
            f"{checkpoint} was trained with other settings than the recipe's, which a resume cannot change: "
            f"{named}. Go on with the settings of the run, or begin a new run from its weights "
            f"by {argument('init', checkpoint)}"
        )
    train, epochs, steps = recipe.train or Train(), epochs_done(state), state["global_step"]
    for key, end, done in (("epochs", train.epochs, epochs), ("max_steps", train.max_steps, steps)):
        if end is not None and end < done:
            raise RunError(f"{checkpoint} has {done} {key.removeprefix('max_')} behind it: train.{key} is {end}")
    return found


def epochs_done(state: Mapping[str, Any]) -> int:
    """Return the whole epochs that a checkpoint has behind it."""
    done: int = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return done


def _differences(before: Any, recipe: Recipe) -> Iterator[Difference]:
    try:
        earlier = load_recipe(before)
    except RecipeError:  # of another version of the language
        earlier = None
    nothing = Document({})
    if earlier is not None and replace(earlier, document=nothing) == replace(recipe, document=nothing):
        return
    for change in differences(earlier.document.data if earlier else before, recipe.document.data):
        default = (at(change.path.split(".")) or {}).get("default", ABSENT)
        values = [default if value is ABSENT else value for value in (change.before, change.after)]
        if values[0] != values[1]:
            yield change


def in_words(changes: Sequence[Difference]) -> str:
    """Return changes in a line: `train.epochs (10 → 20), …`."""
    return ", ".join(f"{change.path} ({_word(change.before)} → {_word(change.after)})" for change in changes)


def is_relaid(changes: Sequence[Difference]) -> bool:
    """Tell whether the learning rate is to be laid out anew."""
    return any(_matches(change.path, RELAID) for change in changes)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _word(value: Any) -> str:
    return "not given" if value is ABSENT else value if isinstance(value, str) else dumps(value, default=str)


class Relay(Callback):
    """Lays the learning rate of a resumed run out anew: as if the run had had this schedule from its beginning."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the schedule of the checkpoint away from the new one, which may be of another kind."""
        checkpoint["lr_schedulers"] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the recipe's learning rate, weight decay and schedule in the place of those of the checkpoint."""
        fresh: Any = pl_module.configure_optimizers()
        schedule = fresh["lr_scheduler"]["scheduler"]
        for _ in range(trainer.global_step):
            schedule.step()
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        config.scheduler.load_state_dict(schedule.state_dict())
        for group, laid_out in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
            group.update({key: laid_out[key] for key in ("lr", "initial_lr", "weight_decay") if key in laid_out})
