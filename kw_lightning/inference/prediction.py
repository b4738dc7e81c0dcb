"""What a network says of one image, and tables of it as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError, mistake, needs
from kw_lightning.paths import writable


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes:
        top: (class name, score), the highest score first; scores are probabilities of one class among all, or of a
            network for several labels an image each class's own. Empty where the image could not be read, **or** no
            class has the score that was asked for.
        path: the image's file, if it came from one.
        problem: why there is no answer.
    """

    top: tuple[tuple[str, float], ...] = ()
    path: str | None = None
    problem: str | None = None

    @property
    def label(self) -> str | None:
        """Return the name of the class with the highest score."""
        return self.top[0][0] if self.top else None

    @property
    def score(self) -> float | None:
        """Return the highest score."""
        return self.top[0][1] if self.top else None

    def row(self, top: int) -> dict[str, Any]:
        """Return the prediction as one row: `path, label, score, label_2, score_2, …, problem`.

        Args:
            top: how many classes the row has; places without one are None.
        """
        readable = self.path and self.path.encode(errors="backslashreplace").decode()  # where a name is no UTF-8
        found: dict[str, Any] = {"path": readable}
        for number in range(1, top + 1):
            suffix = "" if number == 1 else f"_{number}"
            label, score = self.top[number - 1] if number <= len(self.top) else (None, None)
            found |= {f"label{suffix}": label, f"score{suffix}": score}
        return found | {"problem": self.problem}


def write_predictions(predictions: Iterable[Prediction], path: Path, top: int) -> None:
    """Write one row an image, in the form that the file's ending names: `.csv`, `.json` or `.parquet`.

    Raises:
        RunError: another ending, a file that cannot be written, **or** Parquet without pyarrow.
    """
    rows = [prediction.row(top) for prediction in predictions]
    writer = writer_of(path)
    with writable(path) as partial:
        writer(rows, partial)


def writer_of(path: Path) -> Callable[[Sequence[Mapping[str, Any]], Path], None]:
    """Return what writes rows in the form that a file's ending names.

    Raises:
        RunError: another ending, a file that cannot be written, **or** Parquet without pyarrow.
    """
    if path.suffix.lower() not in _WRITERS:
        raise RunError(f"a table of predictions: {mistake(path.name, [f'NAME{ending}' for ending in _WRITERS])}")
    with writable(path):
        pass  # whether it can be, before images are read
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise RunError(needs(f"{path}: Parquet", "pyarrow", "parquet", error)) from None
    return _WRITERS[path.suffix.lower()]


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["path", "label", "score", "problem"])
        table.writeheader()
        table.writerows(rows)


def _write_json(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


_WRITERS: dict[str, Callable[[Sequence[Mapping[str, Any]], Path], None]] = {
    ".csv": _write_csv,
    ".json": _write_json,
    ".parquet": _write_parquet,
}
