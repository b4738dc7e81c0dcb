"""Going on at the end of an epoch, where Lightning leaves a step out, or the whole end is repeated.

A step of ReduceLROnPlateau comes after the checkpoint of its epoch, so that a run which goes on from there has missed
it, and Lightning takes none at the end of an epoch that was gone on with inside. A run with `max_steps` always goes on
inside an epoch, for Lightning, so that an epoch that has ended would end again, without its metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Trainer


class MissedStep(NamedTuple):
    """A step of ReduceLROnPlateau that is still to be taken.

    Attributes:
        epoch: how many epochs had been trained.
        metrics: what they had logged by then.
    """

    epoch: int
    metrics: Mapping[str, float]

    def take(self, trainer: Trainer) -> None:
        """Step the schedules that are due, each with the metric that it monitors."""
        if not trainer.lightning_module.automatic_optimization:
            return
        for schedule in trainer.lr_scheduler_configs:
            due = schedule.reduce_on_plateau and schedule.interval == "epoch" and self.epoch % schedule.frequency == 0
            metric = self.metrics.get(schedule.monitor or "")
            if due and metric is not None:
                trainer.lightning_module.lr_scheduler_step(schedule.scheduler, metric)


def missed_by(checkpoint: Mapping[str, Any], metrics: Mapping[str, float]) -> MissedStep | None:
    """Return the step that came after a checkpoint; None where it was inside an epoch, or after all of it."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    before_it = between_epochs(checkpoint) and epochs["processed"] != epochs["completed"]
    return MissedStep(epochs["processed"], metrics) if before_it else None


def missed_now(trainer: Trainer) -> MissedStep | None:
    """Return the step that Lightning leaves out after this epoch; for `on_train_epoch_end`."""
    if not (trainer.fit_loop.restarting and trainer.is_last_batch):
        return None
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return MissedStep(epochs.processed, numbers_of(trainer))


def between_epochs(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint was written after the last batch of an epoch and its evaluation."""
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]
    return bool(loop["epoch_loop.batch_progress"]["is_last_batch"]) and epochs["ready"] == epochs["processed"]


def numbers_of(trainer: Trainer) -> dict[str, float]:
    """Return what was logged, as plain numbers."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class WithoutMaxSteps:
    """Takes `max_steps` from a Trainer while it finds out where to go on, and gives it back."""

    def __init__(self) -> None:
        self._taken: int | None = None

    def take(self, trainer: Trainer) -> None:
        """Take it, once optimizers and schedules know it and before Lightning restores its loops."""
        loop = trainer.fit_loop.epoch_loop
        self._taken, loop.max_steps = loop.max_steps, -1

    def give_back(self, trainer: Trainer) -> None:
        """Give back what was taken."""
        if self._taken is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._taken
            self._taken = None
