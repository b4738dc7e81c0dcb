"""`metrics.csv`: one row for each step at which something is logged."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kw_lightning.paths import whole

FIRST = ("step", "epoch")
log = logging.getLogger(__name__)

Row = dict[str, float]


class MetricsTable(Logger):
    """Writes metrics as CSV, `step` and `epoch` first; a row is complete when the next step begins.

    A file that is there is continued. Lightning's CSVLogger would delete it, and writes a row for every call.

    Args:
        path: the file.
        steps: optimizer steps of the run so far; rows of later steps are dropped.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        super().__init__()
        self.path = path
        self._earlier = steps
        self._rows: dict[int, Row] | None = None
        self._columns: list[str] = []
        self._last = -1
        self._end = 0  # of the file without its last row, which may become longer

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        """Do nothing: the run folder holds the recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of their step, and write it."""
        rows = self._known()
        number = self._last + 1 if step is None else step
        before, self._last = self._last, max(self._last, number)
        rows.setdefault(number, {}).update({key: float(value) for key, value in metrics.items()})
        if number < self._last or not metrics.keys() <= {*FIRST, *self._columns}:
            self._write_all()
            return
        with self.path.open("r+b") as file:
            if number > before:
                self._end = file.seek(0, 2)
            file.seek(self._end)
            file.truncate()
            file.write(self._line(number).encode())

    def _known(self) -> dict[int, Row]:
        if self._rows is None:
            found = read_metrics(self.path) if self._earlier else []
            self._rows = {int(row.pop("step")): row for row in found if row["step"] < self._earlier}
            self._last = max(self._rows, default=-1)
            self._write_all()
        return self._rows

    def _write_all(self) -> None:
        rows = self._rows or {}
        self._columns = _columns(rows.values())
        lines = [_csv((FIRST[0], *self._columns)), *(self._line(step) for step in sorted(rows))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as partial:
            partial.write_text("".join(lines), encoding="utf-8", newline="")
        self._end = sum(len(line.encode()) for line in (lines[:-1] if rows else lines))

    def _line(self, step: int) -> str:
        row = self._known()[step]
        return _csv((str(step), *(_text(row[key]) if key in row else "" for key in self._columns)))


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.csv`, without their empty places; none where there is no such file.

    Lines that are no rows, as a full disk or a power cut leaves them, are left out, and this is said.
    """
    if not path.is_file():
        return []
    rows, damaged = parse_metrics(path)
    if damaged:
        log.warning("%s: %d lines are damaged and left out", path, damaged)
    return rows


def parse_metrics(path: Path) -> tuple[list[Row], int]:
    """Return the rows of a `metrics.csv`, and the number of lines that are no rows of it."""
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "\ufffd")
    lines = text.splitlines() or [""]
    rows: list[Row] = []
    columns = next(csv.reader(lines[:1]), [])
    if "step" not in columns:
        return [], len(lines)
    for line in lines[1:]:
        try:
            (values,) = csv.reader([line])
            row = {key: _number(value) for key, value in zip(columns, values, strict=True) if value}
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, OverflowError, csv.Error):
            continue
    return rows, len(lines) - 1 - len(rows)


def _csv(values: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _columns(rows: Iterable[Row]) -> list[str]:
    names = {key for row in rows for key in row}
    return [*(key for key in FIRST[1:] if key in names), *sorted(names.difference(FIRST))]


def _text(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else repr(value)


def _number(text: str) -> float:
    return int(text) if text.isascii() and text.isdigit() else float(text)
