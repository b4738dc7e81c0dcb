"""What ends a run besides its disk is one line, and nothing beside it."""

from __future__ import annotations

import sys

import pytest

from kw_lightning.errors import RunError
from kw_lightning.fit.failures import readable_failures


class Last:
    """Raises where nothing can be raised: when it goes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __del__(self) -> None:
        raise RuntimeError(self.text)


@readable_failures()
def lose_a_worker() -> None:
    Last("DataLoader worker (pid 1) is killed by signal: Killed.")
    Last("something else")
    raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")


def test_of_a_worker_that_ends_no_more_is_told_than_the_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    with pytest.raises(RunError, match="a process that reads images was ended from outside"):
        lose_a_worker()
    Last("afterwards")
    assert told == ["something else", "afterwards"]
