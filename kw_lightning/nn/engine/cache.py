"""The files that are kept from one process to the next, in a folder that nobody else can write.

Compiled code is loaded from here, so a folder or file that belongs to another user, or that others may write, is not
used. Files are written atomically and synced to the disk; a file with a checksum beside it, as `sha256sum` writes
them, is checked before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 64 * 2**20
"""Bytes that are read of a file at most: more than any that is kept has."""

OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CacheError(Exception):
    """Why something cannot be kept, or what is kept cannot be used; one line."""


def cache_folder() -> Path:
    """Return the folder of what is compiled and measured on this machine: `$XDG_CACHE_HOME/kw_lightning`.

    Raises:
        CacheError: there is no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # unset, or relative, which the XDG specification ignores
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise CacheError("there is no home folder; set XDG_CACHE_HOME to a folder of your own") from error
    return base / "kw_lightning"


def open_cache() -> Path:
    """Return `cache_folder()`, made if need be.

    Raises:
        CacheError: there is none, it cannot be made, **or** somebody else can write it.
    """
    folder = cache_folder()
    with _readable(folder):
        _check_folder(folder)  # before anything is made in somebody else's folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_folder(folder)
    return folder


def read(path: Path) -> bytes | None:
    """Return a file's content; None where it is not there.

    Raises:
        CacheError: it is no file, cannot be read, **or** somebody else can have written it.
    """
    with _readable(path):
        try:
            # A link is not followed, and a pipe not waited for.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
                raise CacheError(f"{path} is no file of kw_lightning")
            _check_owner(path, found)
            if found.st_mode & OTHERS:
                raise CacheError(f"{path} can be written by others")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(LARGEST)
        finally:
            os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, and sync it to the disk: neither another process nor a crash sees half of it.

    Raises:
        CacheError: it cannot be written, as on a full disk.
    """
    with _readable(path):
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
        if os.name == "posix":
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_checked(path: Path) -> bytes | None:
    """Return a file's content as `read` does, if it is what `write_checked` wrote.

    Raises:
        CacheError: as `read`, **or** the checksum beside it is another.
    """
    content = read(path)
    if content is not None and read(_checksum_file(path)) != _checksum_line(path, content):
        raise CacheError(f"{path} is damaged: it is not what its checksum says")
    return content


def write_checked(path: Path, content: bytes) -> None:
    """Write a file as `write` does, and its checksum beside it.

    Raises:
        CacheError: as `write`.
    """
    write(path, content)
    write(_checksum_file(path), _checksum_line(path, content))


def discard(path: Path) -> None:
    """Take a file and its checksum away, if they are there and can be."""
    for file in (path, _checksum_file(path)):
        with contextlib.suppress(OSError):
            file.unlink()


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()


def _check_folder(folder: Path) -> None:
    """Check the folder and its parents, along every link: whoever can rename one of them can put another there."""
    if os.name != "posix":
        return
    real = Path(os.path.realpath(folder))
    for path in dict.fromkeys((*folder.parents, folder, *real.parents, real)):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        _check_owner(path, found)
        if stat.S_ISLNK(found.st_mode):
            continue
        shared = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX  # as /tmp is not
        if shared or (path in (folder, real) and found.st_mode & OTHERS):
            raise CacheError(f"{path} can be written by others (chmod go-w {path})")


def _check_owner(path: Path, found: os.stat_result) -> None:
    if os.name == "posix" and found.st_uid not in (os.geteuid(), 0):
        raise CacheError(f"{path} belongs to another user (uid {found.st_uid})")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"{error.filename or path}: {error.strerror or error}") from error
