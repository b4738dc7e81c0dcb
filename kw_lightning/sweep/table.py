"""The table of a sweep: Markdown to read, CSV and JSON to go on with."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from kw_lightning.fit.report import json_text
from kw_lightning.sweep.folder import SweepFolder
from kw_lightning.sweep.results import Results, RowResult

NAMES = {"val": "validation", "test": "test"}
PLAIN = ("loss",)
"""Metrics that are no share; the others are shown in percent."""


def markdown(results: Results) -> str:
    """Return the table as Markdown whose columns stand below each other in plain text too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in text_rows(results)]
    return "\n".join(_lines(rows, max(len(_keys(results)), 1))) + "\n"


def text_rows(results: Results) -> list[list[str]]:
    """Return the table as texts, its head first."""
    metric, keys = results.manifest.metric, _keys(results)
    head = [*(keys or ["recipe"]), "seeds", "parameters", *(["trainable"] if _frozen(results) else []), "multiply-adds"]
    for part in results.parts:
        unit = "" if metric in PLAIN else ", %"
        head += [f"{NAMES[part]} {metric}{unit}", "to the first row (95 %)"]
    rows = [head]
    show = partial(figure, metric)
    for row in results.rows:
        entry = row.entry
        cells = [entry.settings.get(key, "") for key in keys] or [entry.name]
        cells += [str(len(row.finished)), f"{entry.parameters:,}"]
        cells += [f"{entry.trainable:,}"] if _frozen(results) else []
        cells.append("–" if entry.multiply_adds is None else f"{entry.multiply_adds:,}")
        for part in results.parts:
            summary, beside = row.parts[part].summary, row.parts[part].difference
            cells += ["–" if summary is None else summary.text(show), "" if beside is None else beside.text(show)]
        rows.append(cells)
    return rows


def csv_text(results: Results) -> str:
    """Return the table as CSV: a line a row, figures as they are, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = _keys(results)
    figures = ("mean", "deviation", "difference", "low", "high")
    columns = [f"{part}_{name}" for part in results.parts for name in figures]
    writer.writerow(["row", *keys, "seeds", "parameters", "trainable", "multiply_adds", *columns])
    for row in results.rows:
        entry = row.entry
        values: list[Any] = [entry.name, *(entry.settings.get(key, "") for key in keys)]
        values += [len(row.finished), entry.parameters, entry.trainable, entry.multiply_adds]
        for part in results.parts:
            found = row.parts[part]
            values += [found.summary and found.summary.mean, found.summary and found.summary.deviation]
            beside = found.difference
            values += [beside and beside.mean, beside and beside.low, beside and beside.high]
        writer.writerow(values)
    return text.getvalue()


def json_of(results: Results, folder: SweepFolder) -> str:
    """Return the results as JSON, with every run."""
    manifest = results.manifest
    rows = [_as_dict(row, results, folder) for row in results.rows]
    found = {"name": manifest.name, "metric": manifest.metric, "seeds": manifest.seeds, "rows": rows}
    return (
        json_text({**found, "missing": [{"row": row, "seed": seed} for row, seed in results.missing]}, indent=2) + "\n"
    )


def _as_dict(row: RowResult, results: Results, folder: SweepFolder) -> dict[str, Any]:
    parts = {
        part: {
            **(asdict(found.summary) if found.summary else {}),
            "difference": asdict(found.difference) if found.difference else None,
        }
        for part, found in row.parts.items()
    }
    runs = [
        {
            "seed": seed,
            "folder": str(folder.run(row.entry.name, seed)),
            **{part: row.parts[part].by_seed.get(seed) for part in results.parts},
        }
        for seed in row.finished
    ]
    return {**asdict(row.entry), **parts, "runs": runs}


def _keys(results: Results) -> list[str]:
    return list(dict.fromkeys(key for row in results.rows for key in row.entry.settings))


def _frozen(results: Results) -> bool:
    return any(row.entry.trainable != row.entry.parameters for row in results.rows)


def figure(metric: str, value: float, sign: str = "") -> str:
    """Return a figure as people read it: a loss as it is, all else in percent."""
    return f"{value:{sign}.4f}" if metric in PLAIN else f"{100 * value:{sign}.2f}"


def _lines(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Yield the lines of a Markdown table, the first `left` columns at the left."""
    widths = [max(3, *map(_width, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [
            cell + " " * (width - _width(cell)) if place < left else " " * (width - _width(cell)) + cell
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            marks = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
            yield f"| {' | '.join(marks)} |"


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
