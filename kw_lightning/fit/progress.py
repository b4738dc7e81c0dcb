"""How a run shows where it is: a bar on a terminal, one line an epoch in a notebook, a pipe or a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class EpochLines(ProgressBar):
    """Prints one line an epoch: `epoch 3/20  train/loss 0.2134  val/accuracy 0.9731  …  1.2 s`."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = 0.0
        self._closed: BrokenPipeError | None = None

    def disable(self) -> None:
        """Print nothing; Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time: a run that is resumed in mid-epoch has no start of its first epoch."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time; end the run if nobody reads its output any more.

        Raises:
            BrokenPipeError: the last line could not be printed; the checkpoint of that epoch is written by now.
        """
        if self._closed is not None:
            raise self._closed
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's metrics; the validation pass is inside the epoch and done."""
        if not self._enabled:
            return
        line = epoch_line(trainer, self.get_metrics(trainer, pl_module), time.perf_counter() - self._start)
        try:
            print(line, flush=True)
        except BrokenPipeError as error:
            self._closed = error


class EpochBar(RichProgressBar):
    """Lightning's bar over the batches of an epoch; the epochs that are done stand above it, a line each."""

    def __init__(self) -> None:
        # The metrics stand in the lines; beside the bar there is no room for them in 80 columns.
        super().__init__()
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time: a run that is resumed in mid-epoch has no start of its first epoch."""
        self._start = time.perf_counter()
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._start = time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's metrics above the bar."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.progress is not None and not self.is_disabled:
            metrics = ProgressBar.get_metrics(self, trainer, pl_module)
            line = epoch_line(trainer, metrics, time.perf_counter() - self._start)
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return nothing to show beside the bar."""
        return {}

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning counts epochs from 0 here, and no public hook words it.
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"


def progress_bar() -> ProgressBar:
    """Return the progress bar that suits where standard output goes."""
    moves = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return EpochBar() if moves else EpochLines()


def epoch_line(trainer: Trainer, metrics: Mapping[str, Any], seconds: float) -> str:
    """Return `epoch 3/20  train/loss 0.2134  …  1.2 s`: the metrics by name, without Lightning's version number."""
    values = [f"{name} {_number(metrics[name])}" for name in sorted(metrics) if name != "v_num"]
    return "  ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *values, f"{seconds:.1f} s"])


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
