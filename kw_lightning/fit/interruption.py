"""Ctrl-C: training ends after the batch that is under way, with a checkpoint that goes on to the bit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Interruption(Callback):
    """Turns Ctrl-C into a KeyboardInterrupt at the end of a training batch, where a checkpoint is exact.

    In the middle of a batch the optimizer may have changed half of the weights. A second Ctrl-C does not wait, nor
    does the first one outside training batches.
    """

    def __init__(self) -> None:
        self._inside = False
        self._wanted = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that a batch is under way."""
        self._inside = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End training if that was asked for during the batch."""
        self._inside = False
        if self._wanted:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note that no batch is under way."""
        self._inside = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal of Ctrl-C.

        Raises:
            KeyboardInterrupt: outside training batches, and the second time.
        """
        if not self._inside or self._wanted:
            raise KeyboardInterrupt
        self._wanted = True


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C end a fit as KeyboardInterrupt, after the callbacks wrote their checkpoint.

    Lightning alone would end the whole process, and leave Ctrl-C switched off, which would hurt a notebook.

    Raises:
        KeyboardInterrupt: training was interrupted.
    """
    handlers = [callback.on_signal for callback in trainer.callbacks if isinstance(callback, Interruption)]  # type: ignore[attr-defined]
    switched = bool(handlers) and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handlers[0]) if switched else None
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if switched:
            signal.signal(signal.SIGINT, before)
