"""The Trainer of a recipe: its callbacks, its loggers, and Lightning's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from kw_lightning.builder import starts_published, starts_warm
from kw_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from kw_lightning.callbacks.exact_checkpoint import KEY as EXACT
from kw_lightning.callbacks.exact_checkpoint import ExactCheckpoint
from kw_lightning.callbacks.finite import FiniteLoss
from kw_lightning.callbacks.method import method_callbacks
from kw_lightning.callbacks.resume import RandomState, RunningMetrics
from kw_lightning.errors import RecipeError, first_line, mistake
from kw_lightning.fit.best_checkpoint import BestCheckpoint
from kw_lightning.fit.early_stopping import StopsEarly
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.freezing import Freezing
from kw_lightning.fit.last_step import LastStep
from kw_lightning.fit.metrics import MetricsTable
from kw_lightning.fit.progress import progress_bar
from kw_lightning.fit.quiet import quiet
from kw_lightning.fit.trackers import check_trackers, make_trackers, writes_tensorboard
from kw_lightning.fit.trainer_arguments import trainer_arguments
from kw_lightning.recipe.types import CheckpointEvery, Recipe, Train

MONITORED = {
    **{f"val/{name}": "max" for name in ("accuracy", "top5", "map", "f1", "exact")},
    **{"val/loss": "min", "train/loss": "min"},
}
"""What `train.monitor` may name, and which direction is better."""
ONE_LABEL, SEVERAL_LABELS = ("val/accuracy", "val/top5"), ("val/map", "val/f1", "val/exact")
"""Those of images with one label and of images with several; the losses are of both."""

OnNan = Literal["stop", "warn"]
NAN_HINT = (
    "lower train.optimizer.lr, give train.schedule.warmup_epochs or train.gradient_clip, or train.precision=bf16-mixed "
    "in place of 16-mixed; 16-true needs train.optimizer.eps=1e-4, since 1e-8 is 0 in float16. {} is the last finite "
    "checkpoint, if there is one"
)


def make_trainer(
    recipe: Recipe,
    folder: RunFolder,
    state: Mapping[str, Any] | None = None,
    *,
    on_nan: OnNan = "stop",
    more: Sequence[Callback] = (),
    validates: bool = True,
) -> Trainer:
    """Return the Trainer that trains a recipe into a run folder.

    Args:
        recipe: the recipe.
        folder: the run folder.
        state: the checkpoint that the run goes on from.
        on_nan: what happens at a loss that is not a number.
        more: further callbacks.
        validates: whether there are validation images.

    Raises:
        RecipeError: settings that Lightning refuses.
    """
    return plain_trainer(
        recipe,
        callbacks=[*make_callbacks(recipe, folder, on_nan, validates=validates), *more],
        logger=make_loggers(recipe, folder, state),
        plugins=[AtomicCheckpointIO()],
    )


def monitored(recipe: Recipe) -> list[str]:
    """Return what the recipe's `train.monitor` may name."""
    others = ONE_LABEL if recipe.several else SEVERAL_LABELS
    return [name for name in MONITORED if name not in others]


def check_settings(recipe: Recipe) -> None:
    """Ask Lightning whether it takes the settings of a recipe on this machine, before there is a folder.

    Raises:
        RecipeError: it does not, **or** a tracker does not.
    """
    check_names(recipe)
    with quiet():
        plain_trainer(recipe, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    check_trackers(recipe)


def check_names(recipe: Recipe) -> None:
    """Check the names that a recipe gives Lightning, whatever this machine has.

    Raises:
        RecipeError: an argument that the Trainer does not have, that is given elsewhere, **or** an unknown strategy.
    """
    trainer_arguments(recipe)
    strategy = (recipe.train or Train()).strategy
    known = ["auto", *StrategyRegistry.available_strategies()]
    if strategy not in known:
        message = mistake(strategy, known, what="the unknown strategy")
        raise RecipeError(recipe.document.problem("train.strategy", message))


def plain_trainer(recipe: Recipe, **parts: Any) -> Trainer:
    train = recipe.train or Train()
    settings: dict[str, Any] = {
        "accelerator": train.accelerator,
        "devices": train.devices,
        "strategy": train.strategy,
        "num_nodes": train.nodes,
        "precision": train.precision,
        **trainer_arguments(recipe),
    }
    try:
        return Trainer(
            **settings,
            max_epochs=train.epochs,
            max_steps=train.max_steps or -1,
            gradient_clip_val=train.gradient_clip,
            accumulate_grad_batches=train.accumulate,
            deterministic=train.deterministic,
            log_every_n_steps=recipe.log.every_n_steps,
            num_sanity_val_steps=0,  # one batch is tried before training, on its own
            enable_model_summary=False,  # the plan is shown before
            **parts,
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in settings.items())
        message = f"Lightning refuses these settings ({given}): {first_line(error)}"
        raise RecipeError(recipe.document.problem("train", message)) from error


def make_callbacks(
    recipe: Recipe, folder: RunFolder, on_nan: OnNan = "stop", *, validates: bool = True
) -> list[Callback]:
    """Return the callbacks of a recipe: checkpoints, learning rate, temperature, statistics, average, progress."""
    train = recipe.train or Train()
    every = train.checkpoint_every or CheckpointEvery()
    chooses = validates or train.monitor.startswith("train/")
    callbacks: list[Callback] = [
        # without validation none is better than another
        BestCheckpoint(folder.best, train.monitor, MONITORED[train.monitor], chooses=chooses),
        ExactCheckpoint(folder.last, steps=every.steps, minutes=every.minutes),
        RandomState(),
        RunningMetrics(),
        FiniteLoss(on_nan, NAN_HINT.format(folder.last)),
        progress_bar(),
    ]
    if train.max_steps is not None:
        callbacks.append(LastStep())
    if train.early_stop is not None:
        mode, finite = MONITORED[train.monitor], on_nan == "stop"
        callbacks.append(StopsEarly(train.early_stop, train.monitor, mode, check_finite=finite))
    if recipe.warehouses or recipe.stages:
        statistics = folder.path / "attention"
        annealed = recipe
        if starts_published(recipe):  # whose annealing is over
            annealed = replace(recipe, temperature=replace(recipe.temperature, start=0.0, end=0.0))
        callbacks += filter(None, method_callbacks(annealed, folder=statistics, warm_start=starts_warm(recipe)))
    if train.freeze:
        callbacks.append(Freezing(train.freeze, train.freeze_epochs))
    if train.ema is not None:
        callbacks.append(Average(train.ema.decay, train.ema.start_epoch))
    return callbacks


def make_loggers(recipe: Recipe, folder: RunFolder, state: Mapping[str, Any] | None = None) -> list[Logger]:
    """Return the loggers of a recipe: `metrics.csv`, TensorBoard's events in `tensorboard/`, its trackers.

    What a killed run logged after its checkpoint is dropped, because it is logged again.
    """
    steps = state["global_step"] if state else 0
    table = MetricsTable(folder.path / "metrics.csv", steps)
    metrics = (state or {}).get(EXACT, {}).get("metrics", {})
    if state and metrics:  # a kill right after the checkpoint of an epoch loses its row
        row = {name: metrics[name] for name in MONITORED if name in metrics}
        table.log_metrics({**row, "epoch": state["epoch"]}, step=steps - 1)
    loggers: list[Logger] = [table]
    if writes_tensorboard(recipe):
        loggers.append(TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=steps or None))
    return [*loggers, *make_trackers(recipe, folder)]


class Average(EMAWeightAveraging):
    """Lightning's moving average of the weights, from an epoch on; before, the average is the network itself.

    Buffers are copied, not averaged: the temperature and the statistics of BatchNorm are those of the network.
    """

    def __init__(self, decay: float, start_epoch: int = 0) -> None:
        super().__init__(use_buffers=False, decay=decay)
        self.start_epoch = start_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Let the next update copy the network while averaging has not begun."""
        if trainer.current_epoch < self.start_epoch and self._average_model is not None:
            self._average_model.n_averaged.zero_()
