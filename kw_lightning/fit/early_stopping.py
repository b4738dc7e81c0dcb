"""The end of a run that gets no better any more, before its last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from kw_lightning.errors import RecipeError
from kw_lightning.recipe.types import EarlyStop, Recipe, Train


class StopsEarly(EarlyStopping):
    """Lightning's EarlyStopping at the end of each epoch; a run that it ended stays so when it is resumed.

    The patience is the recipe's, whatever it was before, so a resume with more of it goes on.

    Args:
        wanted: patience in epochs, and the least that counts as better.
        monitor: the metric.
        mode: "min" or "max", which is better.
        check_finite: whether a metric that is not a number ends the run too.
    """

    def __init__(self, wanted: EarlyStop, monitor: str, mode: str, *, check_finite: bool = True) -> None:
        super().__init__(
            monitor,
            wanted.min_delta,
            wanted.patience,
            mode=mode,
            check_finite=check_finite,
            strict=False,  # an epoch may have no validation, by trainer.check_val_every_n_epoch
            check_on_train_epoch_end=True,  # the validation pass is inside the epoch
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run before its first batch where its patience is over already."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the best value and how long ago it was."""
        super().load_state_dict({**state_dict, "patience": self.patience})


def check_stopping(recipe: Recipe, parts: Sequence[str]) -> None:
    """Check that what early stopping looks at is measured.

    Raises:
        RecipeError: it is not: there are no validation images.
    """
    train = recipe.train or Train()
    if train.early_stop is not None and train.monitor.startswith("val/") and "val" not in parts:
        message = (
            f"looks at train.monitor, {train.monitor}, and the data has no validation part: give it one by "
            "data.validation, as 0.1, or take train.monitor=train/loss"
        )
        raise RecipeError(recipe.document.problem("train.early_stop", message))


def stopping_note(trainer: Trainer) -> str | None:
    """Return in a line that a run ended early, and where that left its learning rate; None where it did not."""
    found = next((callback for callback in trainer.callbacks if isinstance(callback, StopsEarly)), None)  # type: ignore[attr-defined]
    progress: Any = trainer.fit_loop.epoch_progress.current
    done = progress.processed
    if found is None or found.wait_count < found.patience or done >= (trainer.max_epochs or 0):
        return None
    since = f"{found.wait_count} {'epoch' if found.wait_count == 1 else 'epochs'}"
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return (
        f"stopped early, after epoch {done} of {trainer.max_epochs}: {found.monitor} was best, "
        f"{float(found.best_score):.4f}, {since} before; the schedule of the learning rate did not "
        f"come to its end, it stood at {rate:.3g}"
    )
