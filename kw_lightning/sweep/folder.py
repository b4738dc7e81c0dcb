"""The folder of a sweep: its grid, the frozen recipe of every row, and where each run lies.

runs/net-sweep/
  sweep.json            the grid, what the rows differ in, their parameters and multiply-adds
  recipes/budget=1.yaml the recipe of a row, resolved and locked: a file that is edited changes no run
  budget=1/seed=0/      a run folder of kw-fit
  budget=1/seed=0.log   what it printed
  table.md, table.csv, table.json, accuracy.svg
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kw_lightning.errors import RunError
from kw_lightning.fit.folder import readable_errors
from kw_lightning.fit.report import json_text
from kw_lightning.paths import whole
from kw_lightning.sweep.grid import label_of

MANIFEST = "sweep.json"
VERSION = 1
PATIENCE = 60.0
"""Seconds that a run of a sweep that was killed has to write its checkpoint and end."""


@dataclass(frozen=True)
class Entry:
    """One row of the grid, as the folder keeps it.

    Attributes:
        name: of its folder.
        settings: label → value of what differs between rows.
        recipe: the file or shipped name that it came from.
        changes: the overrides.
        content: hash of the recipe.
        parameters: of the network.
        multiply_adds: for one sample, None where they are not known.
        trainable: parameters that train.
    """

    name: str
    settings: Mapping[str, str]
    recipe: str
    changes: tuple[str, ...]
    content: str
    parameters: int
    multiply_adds: int | None
    trainable: int

    @property
    def label(self) -> str:
        """Return what tells the row from the others, for people."""
        return label_of(self.settings.items(), self.name)


@dataclass(frozen=True)
class Manifest:
    """The grid of a folder.

    Attributes:
        name: of the sweep.
        metric: what the first row chooses its checkpoint by, as "accuracy".
        seeds: of every row.
        rows: in the order of the table.
    """

    name: str
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[Entry, ...]

    def text(self) -> str:
        """Return it as JSON."""
        return json_text({"version": VERSION, **asdict(self)}, indent=2) + "\n"


BEFORE = (".lock", "slurm")
"""What may be there before the sweep itself: a lock that is left, and submitit's folder, made to try its options."""


class SweepFolder:
    """A folder with the runs of a sweep; one process at a time starts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", blocking=False, thread_local=False)

    def claim(self) -> None:
        """Make the folder and keep other sweeps out of it until the end of this process.

        Raises:
            RunError: another one is at work there, it holds something else, **or** it cannot be written.
        """
        with readable_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path} is a file; a sweep needs a folder")
            others = self.path.is_dir() and any(file.name not in BEFORE for file in self.path.iterdir())
            if others and not (self.path / MANIFEST).exists():
                raise RunError(f"{self.path} is not empty and holds no sweep. Give another folder with --output")
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise RunError(f"{self.path}: another kw sweep is at work in this folder") from None

    def release(self) -> None:
        """Let others start runs in the folder."""
        self._lock.release()

    def manifest(self) -> Manifest | None:
        """Return the grid of the folder, None where there is none yet.

        Raises:
            RunError: it cannot be read.
        """
        file = self.path / MANIFEST
        if not file.exists():
            return None
        with readable_errors(file):
            content = file.read_bytes()
        try:
            data = json.loads(content)
            rows = tuple(Entry(**{**row, "changes": tuple(row["changes"])}) for row in data["rows"])
            return Manifest(str(data["name"]), str(data["metric"]), tuple(map(int, data["seeds"])), rows)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RunError(f"{file} is damaged, or was not written by kw sweep") from None

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        file = self.path / name
        with readable_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                partial.write_text(text, encoding="utf-8", newline="")

    def recipe(self, row: str) -> Path:
        """Return the frozen recipe of a row."""
        return self.path / "recipes" / f"{row}.yaml"

    def run(self, row: str, seed: int) -> Path:
        """Return the run folder of a row and a seed."""
        return self.path / row / f"seed={seed}"

    def log(self, row: str, seed: int) -> Path:
        """Return the file with what a run printed."""
        return self.path / row / f"seed={seed}.log"

    def started(self, row: str) -> bool:
        """Tell whether any run of a row has begun."""
        return any((self.path / row).glob("seed=*/checkpoints/*.ckpt"))

    def finished(self, row: str, seed: int) -> bool:
        """Tell whether a run has come to its end: its figures and its network are written."""
        run = self.run(row, seed)
        return (run / "result.json").is_file() and any((run / "model").glob("*.safetensors"))


def wait_for_end(run: Path) -> None:
    """Wait until no process writes a run folder: one that a killed sweep left ends by itself.

    Raises:
        RunError: one goes on writing it.
    """
    if not (run / ".lock").exists():
        return
    try:
        with FileLock(run / ".lock", timeout=PATIENCE):
            pass
    except Timeout:
        raise RunError(f"{run}: another process is training in this folder") from None


def read_result(run: Path) -> dict[str, Any] | None:
    """Return the `result.json` of a run that has one; None where it has none, or a damaged one."""
    try:
        found = json.loads((run / "result.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
