"""Paths that a user gives: `~` filled in, and refused in a line where the system cannot hold such a name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kw_lightning.errors import RunError, printable


def user_path(given: str | Path) -> Path:
    """Return a path that a user gave, whether or not anything is there; it can be asked what it is.

    Raises:
        RunError: `~NAME` of nobody, a name that is too long or holds a null character, **or** a folder on the way that
            may not be searched.
    """
    try:
        path = Path(given).expanduser()
    except RuntimeError:
        raise RunError(f"{given}: there is no such user, whose home ~ means") from None
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a name cannot hold a null character"
        raise RunError(f"{shortened(given)}: {reason}") from None
    return path


def shortened(given: str | Path, length: int = 80) -> str:
    """Return a path as a message shows it: the beginning of one that fills the screen, in printable characters."""
    text = str(given)
    return printable(text if len(text) <= length else f"{text[:length]}…")


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written into one line.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
