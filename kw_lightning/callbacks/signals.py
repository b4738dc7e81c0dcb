"""Ctrl-C, SIGTERM and SIGHUP as a wish to stop, which training follows where a checkpoint is exact."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from kw_lightning.errors import KWError

CAUGHT = (signal.SIGINT, signal.SIGTERM)
HANGUP = tuple(filter(None, [getattr(signal, "SIGHUP", None)]))
"""Of a terminal that was closed; not on Windows."""
PATIENCE = 3.0
"""Seconds after which a stop that still waits for its place is explained."""


class InterruptedRunError(KWError):
    """Training was asked to stop, and did, after it wrote a checkpoint.

    Attributes:
        signal: SIGINT (Ctrl-C), SIGTERM or SIGHUP.
        exit_code: 128 + signal, as shells count it: 130, 143 or 129.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


class StopSignals:
    """Turns signals, by default SIGINT and SIGTERM, into `wanted` between `catch` and `release`.

    A second Ctrl-C does not wait any more. Workers that are forked in between let the first process decide: the
    signals of a terminal or of a cluster reach every process of the job.

    Attributes:
        wanted: number of the signal that came, 0 before.
    """

    def __init__(self, numbers: Sequence[int] = CAUGHT) -> None:
        self.wanted = 0
        self._numbers = numbers
        self._before: dict[int, Any] = {}
        self._process = 0
        self._timer: threading.Timer | None = None

    def catch(self) -> None:
        """Handle the signals from now on; in the main thread only, as Python has it."""
        self.wanted, self._process = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if number in HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup lets it go on
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def release(self) -> None:
        """Give the signals back to who had them before."""
        if self._timer is not None:
            self._timer.cancel()
        if threading.current_thread() is threading.main_thread() and self._process == os.getpid():
            for number, handler in self._before.items():
                signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.wanted = self.wanted, number
        if os.getpid() != self._process:  # a worker: it ends with its parent, or when it is told twice
            if again and number == signal.SIGTERM:
                os._exit(128 + number)
        elif again and number == signal.SIGINT:
            raise KeyboardInterrupt
        elif not again and not getattr(rank_zero_only, "rank", 0):
            self._timer = threading.Timer(PATIENCE, self._explain)
            self._timer.daemon = True
            self._timer.start()

    def _explain(self) -> None:
        hint = "Ctrl-C again stops at once and keeps the checkpoint before" if self.wanted == signal.SIGINT else ""
        print(f"stopping after this batch or evaluation; {hint}".rstrip("; "), file=sys.stderr, flush=True)
