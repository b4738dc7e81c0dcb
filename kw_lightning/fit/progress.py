"""How a run shows where it is: a bar on a terminal, a widget in a notebook, one line an epoch in a pipe or a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


class EpochLines(ProgressBar):
    """Prints one line an epoch: `epoch 3/20  train/loss 0.2134  val/accuracy 0.9731  …  1.2 s`."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = 0.0

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
        """Note the time."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's metrics; the validation pass is inside the epoch and done."""
        if not self._enabled:
            return
        values = [f"{name} {_number(value)}" for name, value in self.get_metrics(trainer, pl_module).items()]
        number = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        print("  ".join([number, *values, f"{time.perf_counter() - self._start:.1f} s"]), flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics by name, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: metrics[name] for name in sorted(metrics) if name != "v_num"}


def progress_bar() -> ProgressBar:
    """Return the progress bar that suits where standard output goes."""
    if "ipykernel" in sys.modules:
        return TQDMProgressBar()
    return RichProgressBar() if sys.stdout.isatty() else EpochLines()


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
