"""The table of metrics that ends a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from json import dumps
from typing import Any

from rich.table import Table
from rich.text import Text

from kw_lightning.fit.by_class import ClassMetrics, worst

ROWS = (
    ("accuracy", "top-1 accuracy"),
    ("top5", "top-5 accuracy"),
    ("map", "mean average precision"),
    ("f1", "F1 score"),
    ("exact", "every label right"),
    ("loss", "loss"),
)

SHOWN_CLASSES = 10
"""Classes that a table shows at the most."""

Metrics = Mapping[str, float]


def metrics_table(columns: Mapping[str, Metrics], note: str | None = None) -> Table:
    """Return a table with a row for each metric and a column for each checkpoint, and a note below it."""
    table = Table("evaluation", caption=note, caption_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in ROWS:
        if not all(key in metrics for metrics in columns.values()):  # the best five of five classes
            continue
        cells = [f"{metrics[key]:.4f}" if key == "loss" else f"{metrics[key]:.2%}" for metrics in columns.values()]
        table.add_row(label, *cells)
    return table


def classes_table(classes: Sequence[ClassMetrics]) -> Table:
    """Return a table with a row for each class, or for the ten that are recognised worst where there are more."""
    shown = classes if len(classes) <= SHOWN_CLASSES else worst(classes, SHOWN_CLASSES)
    head = "class" if len(shown) == len(classes) else f"worst {len(shown)} of {len(classes):,} classes"
    table = Table(head)
    measured = [key for key in ("average_precision", "recall", "precision") if classes and key in classes[0]]
    for name in ("images", *measured):
        table.add_column(name.replace("_", " "), justify="right")
    for entry in shown:
        values = ("–" if entry[key] is None else f"{entry[key]:.2%}" for key in measured)
        table.add_row(Text(entry["name"]), f"{entry['images']:,}", *values)
    return table


def json_text(data: Any, indent: int | None = None) -> str:
    """Return plain data as JSON, which has no word for infinite numbers and those that are none: they become null."""
    return dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
