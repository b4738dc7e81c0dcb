"""One line for what ends a run, its disk aside: too little memory, a worker process that died, a batch of one image."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kw_lightning.errors import RunError

SMALLER = (
    "make data.batch_size smaller (and train.accumulate larger, which keeps the optimizer's steps as they are), "
    "or data.workers"
)
FEWER = "make data.workers or data.batch_size smaller"
ENDED = "a process that reads images was ended from outside, as systems do that run out of memory"

ALONE = (
    "a batch of one image trains, of which a batch norm on maps of 1×1 has no statistics; "
    "make data.batch_size 2 or more, or use a norm that does without, as a layer norm"
)

WORKER = "DataLoader worker"  # so torch's messages of one that ended begin


@contextmanager
def readable_failures(help_memory: str = SMALLER, help_workers: str = FEWER) -> Iterator[None]:
    """Turn the lack of memory, and the end of a worker, into one message.

    Args:
        help_memory: what to do where there is too little memory.
        help_workers: what to do where a worker was ended.

    Raises:
        RunError: in place of torch's errors. On the CPU they are a plain RuntimeError, known by its text alone.
    """
    ended = f"{ENDED}; {help_workers}"
    try:
        with _quiet_while_nothing_can_be_raised():
            yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"the device's memory is too small for this run; {help_memory}") from error
    except MemoryError as error:
        raise RunError(f"the computer's memory is too small for this run; {help_memory}") from error
    except RuntimeError as error:
        text = str(error)
        if "DefaultCPUAllocator" in text:
            raise RunError(f"the computer's memory is too small for this run; {help_memory}") from error
        if text.startswith(WORKER):
            raise RunError(ended) from error
        raise
    except (ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        if isinstance(error, EOFError) and error.args:
            raise  # of a file
        raise RunError(ended) from error  # the worker ended while it handed over a batch


@contextmanager
def readable_training() -> Iterator[None]:
    """Turn these, and a batch that is too small for a norm, into one message.

    Raises:
        RunError: in place of torch's errors.
    """
    try:
        with readable_failures():
            yield
    except ValueError as error:
        if str(error).startswith("Expected more than 1 value per channel when training"):
            raise RunError(ALONE) from error
        raise


@contextmanager
def _quiet_while_nothing_can_be_raised() -> Iterator[None]:
    """Print nothing of a worker's end that is heard in a destructor: the loader notices it in seconds, and raises."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not str(unraisable.exc_value).startswith(WORKER):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def silent(worker: int) -> None:
    """Let a process that reads images leave Ctrl-C to the one that waits for them, whose end is no error of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # its own errors are handed over; what comes here is a pipe that was closed
