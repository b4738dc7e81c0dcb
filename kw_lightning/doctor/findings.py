"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What is there, or what is wrong with it.

    Attributes:
        subject: what was looked at: a file, a device, a package.
        found: in a line.
        amiss: whether something is wrong with it.
    """

    subject: str
    found: str
    amiss: bool = False
