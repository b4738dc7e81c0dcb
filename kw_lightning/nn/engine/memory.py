"""How much memory a process may still take: of the machine's, and within a container's control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def free_bytes(root: Path = ROOT) -> int | None:
    """Return the bytes that are free, including caches that can be dropped; None where the system does not tell.

    Args:
        root: of the file system in which Linux reports them.
    """
    return min(_told(root), default=None)


def _told(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])
    groups = root / "sys/fs/cgroup"
    for folder, limit, usage in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        bounds = [_read(folder / name).strip() for name in (limit, usage)]
        if all(bound.isdecimal() for bound in bounds):  # "max" is no bound
            yield max(int(bounds[0]) - int(bounds[1]), 0)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
