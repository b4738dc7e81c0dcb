"""Ctrl-C in a fit: a KeyboardInterrupt for whoever called it, as a notebook expects."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_only

from kw_lightning.callbacks.finite import NonFiniteError
from kw_lightning.callbacks.signals import InterruptedRunError
from kw_lightning.errors import argument
from kw_lightning.fit.folder import RunFolder


@contextmanager
def interruptible(folder: RunFolder) -> Iterator[None]:
    """Let Ctrl-C end a fit as KeyboardInterrupt, SIGTERM and SIGHUP as `InterruptedRunError`, with the way to go on.

    Lightning alone would end the whole process, and leave Ctrl-C switched off, which would hurt a notebook.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        InterruptedRunError: SIGTERM or SIGHUP, after the checkpoint was written.
        NonFiniteError: as it came; of both, only the first process of a run says it.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except (InterruptedRunError, NonFiniteError) as stop:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_first_process():
            raise SystemExit(stop.exit_code) from None  # the first one speaks for all
        if isinstance(stop, NonFiniteError):
            raise
        message = f"{stop}: go on with {argument('resume', folder.path)}"
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt(message) from None
        raise InterruptedRunError(message, stop.signal) from None
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise  # Lightning makes the one of the other
        resume = argument("resume", folder.path)
        goes_on = f"; {resume} goes on from the last checkpoint" if folder.last.exists() else ""
        raise KeyboardInterrupt(f"Interrupted{goes_on}") from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def is_first_process() -> bool:
    """Tell whether this process, of those that train together, is the one that writes and speaks."""
    return not getattr(rank_zero_only, "rank", 0)
