"""The end of a run that is counted in steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LastStep(Callback):
    """Validates after the last of `max_steps` inside an epoch, too: its weights may be the best."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run in the way that Lightning validates before."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
