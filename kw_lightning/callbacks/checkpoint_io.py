"""Checkpoint files: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import os
import signal
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from kw_lightning.errors import KWError, RunError, sentence, shown
from kw_lightning.paths import whole

VERSION = "pytorch-lightning_version"  # of every checkpoint of Lightning's Trainer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole and on the disk.

    A kill at any moment leaves the earlier file of that name, or the new one. Lightning's own writer goes through the
    system's temporary folder, and from another disk its last step is a copy, which a kill can cut short.

    Example:
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; to a remote place (`s3://…`) as Lightning does.

        Raises:
            TypeError: `storage_options` are given.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with undisturbed_by_children(), whole(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint; of a local file the checksums are compared.

        Raises:
            RunError: the file is damaged, **or** holds no map; at the first key that the Trainer does not find, it is
                another program's.
        """
        if os.path.isfile(path):
            verify(Path(path))
        state: Any = super().load_checkpoint(path, *args, **options)
        if not isinstance(state, dict):
            raise RunError(f"{path}: not a checkpoint: {sentence(f'a {type(state).__name__}', 'a map')}")
        return state if VERSION in state else Foreign(path, state)


class Foreign(OrderedDict[str, Any]):
    """What a file holds that Lightning's Trainer did not write, as Fabric's, or weights alone."""

    def __init__(self, path: Any, state: dict[str, Any]) -> None:
        super().__init__(state)
        vars(self).update(getattr(state, "__dict__", {}))  # a state dict has versions of its layers there
        self._path = path

    def __missing__(self, key: str) -> Any:
        """Tell that it is none of the Trainer's, in place of a KeyError."""
        found = sentence(shown(self), f"a map with {key}")
        raise RunError(
            f"{self._path}: not a checkpoint of Lightning's Trainer: {found}. load_state_dict loads weights alone"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Be saved and copied as the map that it is."""
        rest = {name: value for name, value in vars(self).items() if name != "_path"}
        return OrderedDict, (), rest, None, iter(self.items())


@contextmanager
def undisturbed_by_children() -> Iterator[None]:
    """Hear of a child process that ended only at the end of the block.

    torch's data loaders raise in the handler of SIGCHLD, wherever the process is; raised inside `torch.save` it leaves
    a writer that cannot be closed, which ends the whole process.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    handler = signal.getsignal(number) if number is not None else None
    if number is None or not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(number, lambda *arguments: heard.append(arguments))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if heard:
            handler(*heard[-1])


def verify(path: Path) -> None:
    """Compare the parts of a checkpoint with the CRC-32 that `torch.save` wrote for each, and `torch.load` ignores.

    Raises:
        RunError: the file is damaged, **or** no checkpoint.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # damaged names and sizes raise errors of many kinds
        raise damaged_file(path, error) from error
    if damaged is not None:
        raise RunError(f"{path}: not a checkpoint, or a damaged one (the checksum of {damaged} is another)")


def read(path: Path) -> Any:
    """Read a checkpoint onto the CPU, its checksums compared, without running code from it.

    Raises:
        RunError: it cannot be read, is damaged or no checkpoint.
    """
    try:
        verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except KWError:
        raise
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a pickle that was altered can fail in any way
        raise damaged_file(path, error) from error


def damaged_file(path: Path, error: Exception) -> RunError:
    """Return what to raise for a file that is no checkpoint, or not any more."""
    return RunError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})")
