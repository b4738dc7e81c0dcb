"""The table of metrics that ends a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

ROWS = (("accuracy", "top-1 accuracy"), ("top5", "top-5 accuracy"), ("loss", "cross entropy"))

Metrics = Mapping[str, float]


def metrics_table(columns: Mapping[str, Metrics]) -> Table:
    """Return a table with a row for each metric and a column for each checkpoint."""
    table = Table("evaluation")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in ROWS:
        if not all(key in metrics for metrics in columns.values()):  # the best five of five classes
            continue
        cells = [f"{metrics[key]:.4f}" if key == "loss" else f"{metrics[key]:.2%}" for metrics in columns.values()]
        table.add_row(label, *cells)
    return table
