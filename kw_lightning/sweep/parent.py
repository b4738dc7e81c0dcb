"""The end of a run whose sweep was killed: a run that nobody waits for would train on beside its successor."""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "KW_SWEEP_PROCESS"
INTERVAL = 0.5
"""Seconds between two looks."""


def end_with_parent() -> None:
    """Stop this process as SIGTERM does, with a checkpoint, once the sweep that started it is gone.

    A process that this one starts does not inherit it: it ends with its own parent.
    """
    parent = os.environ.pop(VARIABLE, "")
    if parent.isdigit():
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
