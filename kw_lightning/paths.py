"""Paths that a user gives, refused in a line where no file can have them, and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kw_lightning.errors import RunError, kind, printable, sentence

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a disk that is full, or of a quota that is reached."""


def user_path(given: str | Path) -> Path:
    """Return a path that a user gave, whether or not anything is there; `is_file` and the like do not raise on it.

    Raises:
        RunError: `~NAME` of nobody, a name that is too long or holds a null character, **or** a folder on the way that
            may not be searched.
        TypeError: no path.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(sentence(f"{kind(given)} in the place of a path", "a string or a Path"))
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


def partial_of(path: Path) -> Path:
    """Return the folder in which a file is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: give a place of its name, from which it moves at the end of the block.

    What else is written into the folder of that place moves along, as weights beside a model's file. A link stays one;
    a device or a pipe, which nothing can take the place of, is written as it is.

    Raises:
        OSError: it cannot be written; an earlier file of that name is as it was.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    partial = partial_of(target)  # of the same name every time, so that what a kill left is removed
    try:
        remove(partial)
        partial.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield partial / target.name
        for file in sorted(partial.iterdir(), key=lambda file: file.name == target.name):
            there = target.with_name(file.name)
            if there.is_file():
                shutil.copymode(there, file)
            file.replace(there)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[Path]:
    """Give the place to write a file to, as `whole` does, and turn what keeps it from being written into one line.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        with whole(path) as partial:
            yield partial
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
