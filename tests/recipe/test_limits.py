"""Files of a stranger are refused in under a second and under 500 MB, in one process for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SECONDS = 1.0
BYTES = 500 * 1000 * 1000

# What the message of each says, so that none is refused for another reason.
REASONS = {
    "file over 1 MiB": "at most 1,048,576 bytes",
    "nested lists": "nested deeper than 64",
    "nested without end": "nested deeper than 64",
    "nested maps": "nested deeper than 64",
    "billion laughs": "more than 10,000 values, aliases expanded",
    "billion laughs of maps": "more than 10,000 values, aliases expanded",
    "billion laughs of merges": "more than 10,000 values, aliases expanded",
    "depth by aliases": "nested deeper than 64, aliases expanded",
    "a long text many times": "more than 10,000 values",
    "twenty digits": "a number of 20 digits",
    "fraction of many digits": "allowed: a number over 0",
    "500,000 layer patterns": "more than 10,000 values",
    "a million layer patterns by aliases": "more than 10,000 values",
    "9,000 layer patterns": "found 9,000 values, allowed: at most 1,000",
    "a million layer patterns by vars": "more than 10,000 values, vars filled in",
    "text by vars": "more than 65,536 characters, vars filled in",
    "unknown vars": 'found the unknown variable "nam", allowed: a name of vars; did you mean "name9"?',
    "python objects": "a recipe has no tags",
    "many large files": "at most 1,048,576 bytes with all that it extends",
    "many values in many files": "at most 10,000 values with all that it extends",
    "16⁶ files": "a recipe comes from at most 32 files",
}


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """Return what loading every attack took, in a process of its own."""
    script = Path(__file__).with_name("attacks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_every_attack_is_refused_in_under_a_second(outcome: dict[str, Any]) -> None:
    slow = {name: seconds for name, (seconds, _) in outcome["results"].items() if seconds >= SECONDS}
    accepted = [name for name, (_, error) in outcome["results"].items() if error is None]
    long = [name for name, (_, error) in outcome["results"].items() if error and len(error.splitlines()) > 110]
    assert len(outcome["results"]) > 35
    assert (slow, accepted, long) == ({}, [], [])


def test_all_attacks_together_take_under_500_megabytes(outcome: dict[str, Any]) -> None:
    assert 0 < outcome["memory"] < BYTES


@pytest.mark.parametrize("name", REASONS)
def test_attack_is_refused_for_its_own_reason(name: str, outcome: dict[str, Any]) -> None:
    errors = [error for attack, (_, error) in outcome["results"].items() if attack.rpartition(" (")[0] == name]
    assert errors
    for error in errors:
        assert REASONS[name] in error
