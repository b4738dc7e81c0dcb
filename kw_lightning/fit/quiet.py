"""Keeps off the screen what Lightning and PyTorch say on every run and a user of `kw-fit` can do nothing about."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# Beginnings (regular expressions) of warnings, and why each is noise here.
NOISE = (
    r"The '\w+' does not have many workers",  # the recipe decides, and images in memory need none
    r"The number of training batches .* is smaller than the logging interval",  # metrics are logged by epoch, too
    r"Checkpoint directory .* exists and is not empty",  # so it is when a run is resumed
    r"Experiment logs directory .* exists and is not empty",  # the same; the earlier rows are kept
    r"The dirpath has changed from",  # a run folder that was moved and then resumed
    r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",  # with 16-bit gradients that overflow
    r"The epoch parameter in `scheduler.step\(\)` was not necessary",  # SequentialLR's own call
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",  # metrics.csv is always there
    r"You are using a CUDA device .* Tensor Cores",  # a tip
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    r"Total length of `list` across ranks is zero",  # no validation images, which is said in other words
    r"You defined a `validation_step` but have no `val_dataloader`",  # the same
    r"Your `IterableDataset` has `__len__` defined",  # as the shards of the examples have, and it is right
    r"GPU available but not used",  # the recipe decides
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the norms of a network beside adapters
    r"Image size .* exceeds limit",  # images of one's own may be large; twice that is refused, with the file's name
)


OWN = Path(__file__).parents[1]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notices below warnings, and the warnings that are noise, off the screen; show ours without a place."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    written, of_threads = warnings.formatwarning, threading.excepthook
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for beginning in NOISE:
                warnings.filterwarnings("ignore", message=beginning)
            warnings.formatwarning = partial(_format, written)
            threading.excepthook = partial(_tell_of_thread, of_threads)
            yield
    finally:
        warnings.formatwarning, threading.excepthook = written, of_threads
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _format(
    others: Callable[..., str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Write a warning of ours as its sentence: the file of the package that says it tells the user nothing."""
    if Path(filename).is_relative_to(OWN):
        return f"{message}\n"
    return others(message, category, filename, lineno, line)


def _tell_of_thread(others: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writer, whose error, as of a full disk, the next call raises again."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        others(failure)
