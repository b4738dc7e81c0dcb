"""A checkpoint that goes on to the bit: every epoch, as often as wanted inside one, and when a run is stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, StochasticWeightAveraging

from kw_lightning.callbacks.epoch_end import (
    MissedStep,
    WithoutMaxSteps,
    between_epochs,
    missed_by,
    missed_now,
    numbers_of,
)
from kw_lightning.callbacks.resume import inside_epoch
from kw_lightning.callbacks.signals import CAUGHT, HANGUP, InterruptedRunError, StopSignals
from kw_lightning.errors import RunError, sentence

KEY = "exact_checkpoint"


class ExactCheckpoint(Checkpoint):
    """Writes a checkpoint only at places from which a resumed run is bit for bit the run that was not stopped.

    These are the end of an epoch and, inside one, the end of a batch with an optimizer step: in the middle of a batch
    the optimizer may have changed half of the weights, and between two steps gradients are accumulated that no
    checkpoint holds. So nothing is written when training fails, and the last exact file stays.

    A resumed run would miss the step that ReduceLROnPlateau takes at an epoch's end; it is made up for before the next
    epoch, but not where the scheduler goes by steps (`interval: step`). An epoch that is resumed also has what
    GradientAccumulationScheduler and StochasticWeightAveraging set at an epoch's start.

    With `fast_dev_run` nothing is written: the file may be that of a run.

    Ctrl-C, SIGTERM and SIGHUP (closing the terminal, except under nohup) stop training at the next such place, with a
    checkpoint. The processes of a run agree on it at the end of each batch, so none waits for another. Evaluation
    inside an epoch is finished first. A second Ctrl-C stops at once and keeps the previous file. During training this
    replaces Lightning's own handler of SIGTERM, which waits for the other processes in the middle of a batch.

    Args:
        path: the file.
        steps: write it every so many optimizer steps, besides the end of each epoch.
        minutes: the same by the clock of the first process.

    Raises:
        ValueError: both `steps` and `minutes`, one that is not over 0, **or** a folder in the place of the file.

    Example:
        >>> trainer = Trainer(
        ...     callbacks=[ExactCheckpoint("run/last.ckpt", minutes=15), RandomState(), RunningMetrics()],
        ...     plugins=[AtomicCheckpointIO()],
        ... )
    """

    def __init__(self, path: str | Path, *, steps: int | None = None, minutes: float | None = None) -> None:
        if steps is not None and minutes is not None:
            raise ValueError(f"give steps or minutes, not both: found steps={steps} and minutes={minutes}")
        for name, value in (("steps", steps), ("minutes", minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is over 0: found {value}")
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(sentence(f"the folder {path}", f'a file, as "{self.path / "last.ckpt"}"'))
        self.steps, self.minutes = steps, minutes
        self._signals = StopSignals((*CAUGHT, *HANGUP))
        self._stop = 0
        self._step = 0
        self._written = 0.0
        self._processes: int | None = None
        self._missed: MissedStep | None = None
        self._begins_at: int | None = None
        self._without_max_steps = WithoutMaxSteps()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a checkpoint that another call than this, as `trainer.test`, has read."""
        self._processes = self._missed = self._begins_at = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run with `max_steps` that goes on between epochs begin the next one."""
        if self._begins_at is not None and self._begins_at < trainer.max_steps:
            self._without_max_steps.take(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals: Lightning has set its own handlers just before.

        Raises:
            RunError: the checkpoint is from inside an epoch of another number of processes.
        """
        self._without_max_steps.give_back(trainer)
        before, self._processes = self._processes, None
        if inside_epoch(trainer):
            if before not in (None, trainer.world_size):
                raise RunError(
                    f"this checkpoint is from inside an epoch of {before} processes, whose batches are not those of "
                    f"{trainer.world_size}: go on with {before}, or from a checkpoint at an epoch's end"
                )
            prepare_epoch(trainer)
        self._stop, self._step, self._written = 0, trainer.global_step, time.monotonic()
        self._signals.catch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End training if that was asked for: only now is all of the epoch before logged.

        Raises:
            InterruptedRunError: training was asked to stop.
        """
        self._end(trainer)
        self._make_up(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End training if that was asked for: only now is all of the batch before logged.

        Raises:
            InterruptedRunError: training was asked to stop.
        """
        self._end(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint where it is due or training is to stop."""
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        wanted, due = agreed(trainer, self._signals.wanted, int(self._is_due(trainer)))
        # the end of an epoch comes after its evaluation
        if (wanted or due) and not trainer.is_last_batch:
            self._write(trainer)
            self._stop = wanted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the epoch."""
        (self._stop,) = agreed(trainer, self._signals.wanted)
        self._write(trainer)
        self._missed = missed_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back.

        Raises:
            InterruptedRunError: training was asked to stop in its last epoch.
        """
        self._signals.release()
        self._end(trainer)
        self._make_up(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and write nothing."""
        self._signals.release()
        self._without_max_steps.give_back(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number of processes, and at the end of an epoch its metrics, which the loggers do not have yet."""
        metrics = {} if inside_epoch(trainer) else numbers_of(trainer)
        checkpoint[KEY] = {"processes": trainer.world_size, "metrics": metrics}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember how many processes wrote the checkpoint, and what came after it."""
        if KEY in checkpoint:
            self._processes = checkpoint[KEY].get("processes")
            self._missed = missed_by(checkpoint, checkpoint[KEY].get("metrics", {}))
            self._begins_at = checkpoint["global_step"] if between_epochs(checkpoint) else None
            if trainer.state.fn == "fit" and trainer.strategy.restore_checkpoint_after_setup:  # after `on_fit_start`
                self.on_fit_start(trainer, pl_module)

    def _make_up(self, trainer: Trainer) -> None:
        missed, self._missed = self._missed, None
        if missed is not None:
            missed.take(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        if self.steps is not None:
            return trainer.global_step % self.steps == 0
        return self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes

    def _write(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
        self._written = time.monotonic()

    def _end(self, trainer: Trainer) -> None:
        if self._stop:
            raise InterruptedRunError(
                f"Interrupted after step {trainer.global_step}; its state is in {self.path}", self._stop
            )


def prepare_epoch(trainer: Trainer) -> None:
    """Let Lightning's callbacks prepare for an epoch that is gone on with: they do so only where one begins."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler | StochasticWeightAveraging):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


def agreed(trainer: Trainer, *values: int) -> tuple[int, ...]:
    """Return the largest of each value over all processes of a run; each of them has to call it."""
    if trainer.world_size == 1:
        return values
    largest = torch.tensor(values, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return tuple(largest.tolist())
