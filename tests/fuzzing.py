"""What the fuzzers share: how many cases came out how, and bytes with a few places broken."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MANY = 10_000
"""Cases of each kind under `-m slow`."""


def fuzz(
    what: str,
    cases: st.SearchStrategy[Any],
    try_one: Callable[[Any], str],
    count: int,
    seconds: float,
    capsys: pytest.CaptureFixture[str] | None = None,
) -> Counter[str]:
    """Try random cases, each of which may take so many seconds of the processor, and count what comes out.

    Args:
        what: the cases are.
        cases: are drawn from this.
        try_one: returns the name of the outcome; whatever it raises fails the test, with the smallest case.
        count: of cases.
        seconds: a machine may be busy, so it is the time of the processor.
        capsys: to draw other cases in each run, and to print the counts although the test passes.
    """
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=count,
        database=None,
        derandomize=capsys is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        gc.disable()  # to collect what the cases before this one left takes seconds, and is no cost of this one
        start = time.process_time()
        try:
            outcome = try_one(case)
        finally:
            gc.enable()
        assert time.process_time() - start < seconds
        outcomes[outcome] += 1

    run()
    assert outcomes.total() >= count
    if capsys is not None:
        with capsys.disabled():
            found = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common())
            print(f"\n{what}: {outcomes.total():,} cases: {found}")
    return outcomes


def hold_lines(lines: list[str]) -> None:
    """Assert that each message is one line that moves no cursor, and not without end."""
    assert lines
    for line in lines:
        assert line.splitlines() == [line], "one mistake is one line"
        assert line.isprintable()
        assert len(line) < 3000


@st.composite
def broken(
    draw: st.DrawFn, contents: st.SearchStrategy[bytes], pieces: st.SearchStrategy[bytes], places: int = 4
) -> bytes:
    """Return one of `contents` with a few places cut, doubled, moved, or overwritten by one of `pieces`."""
    content = draw(contents)
    for _ in range(draw(st.integers(1, places))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(st.integers(0, 40)), len(content))
        match draw(st.sampled_from(("cut", "end", "insert", "replace", "double", "move"))):
            case "cut":
                content = content[:start] + content[stop:]
            case "end":
                content = content[:start]
            case "insert":
                content = content[:start] + draw(pieces) + content[start:]
            case "replace":
                piece = draw(pieces)
                content = content[:start] + piece + content[start + len(piece) :]
            case "double":
                content = content[:stop] + content[start:]
            case "move":
                rest, piece = content[:start] + content[stop:], content[start:stop]
                place = draw(st.integers(0, len(rest)))
                content = rest[:place] + piece + rest[place:]
    return content
