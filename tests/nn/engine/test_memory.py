"""What is free, as Linux tells it of the machine and of a container."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kw_lightning.nn.engine.memory import free_bytes

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    1000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 2000 kB\n"}, None),
        ({"proc/meminfo": MEMINFO}, 1_024_000),
        ({"proc/meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 1_024_000),
        ({"proc/meminfo": MEMINFO, "memory.max": "9000\n", "memory.current": "5000\n"}, 4000),
        ({"proc/meminfo": MEMINFO, "memory.max": "9000\n", "memory.current": "9001\n"}, 0),
        ({"memory/memory.limit_in_bytes": "9000\n", "memory/memory.usage_in_bytes": "2000\n"}, 7000),
    ],
)
def test_the_least_of_what_machine_and_container_leave_is_free(
    files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        file = tmp_path / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert free_bytes(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_something_is_free_here() -> None:
    assert 0 < free_bytes() < 2**50
