"""The run folder: who may write it, what it says of the run, and where its checkpoints are."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kw_lightning.errors import KWError, RunError, argument
from kw_lightning.nn.engine import native
from kw_lightning.paths import FULL, partial_of, remove, whole
from kw_lightning.recipe.scalars import is_unicode
from kw_lightning.versions import package_versions

RUNS = Path("runs")
RECIPE_FILE = "recipe.lock.yaml"
SPLIT_FILE = "split.json"
EXPORTED = (".onnx", ".xml", ".pt2", ".pte", ".safetensors")
"""How files end that hold a network for others, in lower case."""
_NEEDED = "a run folder or a checkpoint file is needed"
OWN = {
    ".lock",
    RECIPE_FILE,
    "versions.json",
    "metrics.csv",
    SPLIT_FILE,
    "result.json",
    "tensorboard",
    "attention",
    "checkpoints",
    "model",
    "trackers.json",
    "wandb",
    "mlflow",
    "mlflow.db",
    "report.html",
    "confusion.csv",
    "classes.csv",
}
"""What a run writes into its folder."""


class RunFolder:
    """A folder of one run; only one process at a time writes it.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The system releases it with the process, and workers that the process forks do not hold it.
        self._lock = FileLock(path / ".lock", blocking=False, thread_local=False)

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Return the newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """Return the checkpoint with the best monitored metric."""
        return self.checkpoints / "best.ckpt"

    @property
    def chosen(self) -> Path:
        """Return the checkpoint that is used where a run is: the best one, the last where none was chosen."""
        return self.best if self.best.is_file() else self.last

    def claim(self, *, resume: bool) -> None:
        """Make the folder and keep other processes out of it until `release` or the end of this process.

        Args:
            resume: whether a run that is there already is continued.

        Raises:
            RunError: the folder holds a run that is not to be continued, another process is writing it,
                it cannot be written, **or** its name is one that no tracker can hold.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run needs a folder")
        if not is_unicode(str(self.path)):
            raise RunError(
                f"{self.path}: found a folder's name that is no text in UTF-8; give another by {argument('output')}"
            )
        with readable_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume and not (self.path / ".lock").exists():
                self._refuse_others()  # before anything is left in a folder that is no run's
            try:
                self._lock.acquire()
            except Timeout:
                raise RunError(f"{self.path}: another process is training in this folder") from None
            if not resume:
                self._refuse_others()
            # what a process that was killed had not written to its end
            for path in (*self.checkpoints.glob(".*.ckpt*.partial"), *(partial_of(self.path / name) for name in OWN)):
                remove(path)

    def empty(self) -> None:
        """Remove what a run wrote that has no checkpoint.

        Raises:
            RunError: there is a checkpoint, **or** a file that is not of a run; nothing is removed then.
        """
        with readable_errors(self.path):
            names = {file.name for file in self.path.iterdir()}
            self._refuse_others(but=OWN if not any(self.checkpoints.glob("*.ckpt")) else frozenset())
            for name in names - {".lock"}:
                remove(self.path / name)

    def release(self) -> None:
        """Let other processes write the folder."""
        self._lock.release()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what fails since the folder was moved or removed, while this process had it, into one message.

        Raises:
            RunError: in place of another.
        """
        try:
            yield
        except RunError as error:
            if not self._lock.is_locked or (self.path / ".lock").exists():
                raise
            raise RunError(
                f"{self.path} was moved or removed while its run was at work; {argument('resume')} and its new place "
                "go on from the last checkpoint there"
            ) from error

    def _refuse_others(self, but: Set[str] = frozenset({".lock"})) -> None:
        if any(file.name not in but for file in self.path.iterdir()):
            self.release()
            raise RunError(
                f"{self.path} is not empty. Give another folder by {argument('output')}, "
                f"or continue the run that is there by {argument('resume', self.path)}"
            )

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        with readable_errors(self.path), whole(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")


def new_folder(name: str, runs: Path = RUNS) -> RunFolder:
    """Return the first folder `runs/NAME-1`, `runs/NAME-2`, … that is not there, made and claimed."""
    number = max((found for found, _ in _numbered(name, runs)), default=0)
    with readable_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            number += 1
            folder = RunFolder(runs / f"{name}-{number}")
            try:
                folder.path.mkdir()  # fails where another process was quicker
            except FileExistsError:
                continue
            folder.claim(resume=False)
            return folder


def newest_folder(name: str, runs: Path = RUNS) -> RunFolder | None:
    """Return the newest run of a recipe that has a checkpoint to continue from."""
    for _, path in sorted(_numbered(name, runs), reverse=True):
        if RunFolder(path).last.exists():
            return RunFolder(path)
    return None


def checkpoint_of(path: Path, *, chosen: bool = False) -> Path:
    """Return the checkpoint that a path means: the file itself, or one of a run folder.

    Args:
        path: the file or folder.
        chosen: of a run folder the chosen one, to be used, in place of the last, to be gone on from.

    Raises:
        RunError: there is none.
    """
    if path.is_file():
        if path.suffix.lower() in EXPORTED:
            raise RunError(f"{path}: an exported network, without recipe and data; {_NEEDED}")
        return path
    found = RunFolder(path).chosen if chosen else RunFolder(path).last
    if found.is_file():
        return found
    there = "no such file or folder" if not path.exists() else "no checkpoints/last.ckpt in this folder"
    raise RunError(f"{path}: {there}; {_NEEDED}")


def folder_of(checkpoint: Path) -> RunFolder:
    """Return the run folder that a checkpoint lies in."""
    return RunFolder(checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent)


def versions() -> str:
    """Return what the run was made with, as JSON: the compiled passes are compiled for it if need be."""
    found = {**package_versions(), "system": platform.platform(), "compiled_passes": str(native.status())}
    return json.dumps(found, indent=2) + "\n"


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk, and files that cannot be read, into one message.

    Raises:
        RunError: in place of an OSError, and of what torch.save makes of one.
    """
    try:
        yield
    except (KWError, BrokenPipeError):  # a pipe that nobody reads is no fault of the folder's
        raise
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        if cause.errno in FULL:
            raise RunError(f"{path}: the disk is full, or a quota is reached") from error
        where = os.fsdecode(cause.filename) if isinstance(cause.filename, bytes) else cause.filename or path
        # an image that cannot be read has no number, but says which it is
        raise RunError(str(cause) if cause.errno is None else f"{where}: {os.strerror(cause.errno)}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the error itself or the last one that led to it, if the system reported it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _numbered(name: str, runs: Path) -> list[tuple[int, Path]]:
    if not runs.is_dir():
        return []
    matches = ((re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name), path) for path in runs.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]
