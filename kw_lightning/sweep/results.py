"""What the runs of a sweep came to: figures of each row over its seeds, beside those of the first row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kw_lightning.sweep.folder import Entry, Manifest, SweepFolder, read_result
from kw_lightning.sweep.statistics import Difference, Summary, paired_difference, summarize

PARTS = ("val", "test")


@dataclass(frozen=True)
class Figures:
    """One part of one row.

    Attributes:
        by_seed: the figure of each finished run.
        summary: mean and deviation; None where there is none.
        difference: to the first row, over the seeds of both; None for the first row itself.
    """

    by_seed: Mapping[int, float]
    summary: Summary | None
    difference: Difference | None


@dataclass(frozen=True)
class RowResult:
    """One row: `parts` has its figures of the validation and of the test images, where any run has them."""

    entry: Entry
    finished: tuple[int, ...]
    parts: Mapping[str, Figures]


@dataclass(frozen=True)
class Results:
    """All rows; `parts` are those of `PARTS` that any run was measured on."""

    manifest: Manifest
    rows: tuple[RowResult, ...]
    parts: tuple[str, ...]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Return the runs that are not finished, by the label of their row and their seed."""
        return [
            (row.entry.label, seed) for row in self.rows for seed in self.manifest.seeds if seed not in row.finished
        ]


def read_results(folder: SweepFolder, manifest: Manifest) -> Results:
    """Return what is finished in a folder.

    Of the validation images it is the figure of the checkpoint that the run chose there; of the test images the same
    checkpoint's, which nothing was chosen by.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for entry in manifest.rows:
        runs = {seed: read_result(folder.run(entry.name, seed)) for seed in manifest.seeds}
        found[entry.name] = {
            seed: figures_of(result, manifest.metric)
            for seed, result in runs.items()
            if result is not None and folder.finished(entry.name, seed)
        }
    parts = tuple(part for part in PARTS if any(part in run for runs in found.values() for run in runs.values()))
    first = found[manifest.rows[0].name]
    rows = tuple(_row(entry, found[entry.name], first, parts) for entry in manifest.rows)
    return Results(manifest, rows, parts)


def figures_of(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return the figure of each part of a `result.json`: of the validation images under `best`, of test under any."""
    figures = {}
    for part in PARTS:
        measured = result.get(part)
        if not isinstance(measured, Mapping):
            continue
        chosen = measured.get("best") or next(iter(measured.values()), None)
        value = chosen.get(metric) if isinstance(chosen, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            figures[part] = float(value)
    return figures


def _row(
    entry: Entry,
    runs: Mapping[int, Mapping[str, float]],
    first: Mapping[int, Mapping[str, float]],
    parts: tuple[str, ...],
) -> RowResult:
    figures = {}
    for part in parts:
        own, other = ({seed: run[part] for seed, run in found.items() if part in run} for found in (runs, first))
        difference = None if runs is first else paired_difference(other, own)
        figures[part] = Figures(own, summarize(list(own.values())), difference)
    return RowResult(entry, tuple(runs), figures)
