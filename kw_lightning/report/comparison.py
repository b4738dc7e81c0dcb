"""Runs side by side: their figures, their curves in one chart, and where their recipes and plans differ.

Runs whose recipes differ in their seed alone are one row, with mean and deviation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError
from kw_lightning.fit.folder import RECIPE_FILE
from kw_lightning.fit.report import ROWS
from kw_lightning.paths import user_path
from kw_lightning.planning.comparison import different_figures
from kw_lightning.recipe.comparison import ABSENT, differences
from kw_lightning.report.charts import Chart, Series, line_chart
from kw_lightning.report.page import Page, Part, Table
from kw_lightning.report.parts import grouped_series, measured_parts
from kw_lightning.report.record import RunRecord, read_run
from kw_lightning.report.writing import REPORT, Report, write_page

COMPARISON = "comparison.html"
DEEPEST = 3
"""Folders between a folder of runs and a run in it, at the most."""
_NAMES = ("name", "description")
_LABELS = dict(ROWS)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds, under the name that tells them from the others."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """Return the run that stands for all where they are the same."""
        return self.runs[0]


def compare(
    paths: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    allow_python: Sequence[str] = (),
    tables: Sequence[Table] = (),
    names: Mapping[str, str] | None = None,
) -> Report:
    """Write a page that compares runs.

    Args:
        paths: run folders, checkpoints, **or** folders of runs, as that of a sweep.
        output: the page; by default `report.html` in the one folder of runs, else `comparison.html` here.
        allow_python: packages whose code the recipes may name.
        tables: more to show at the top.
        names: what groups are called, in the order in which they are to come; the others follow.

    Raises:
        RunError: a path without runs, **or** a page that cannot be written.
    """
    places = [user_path(path) for path in paths]
    found = [(place, run) for place in places for run in find_runs(place)]
    records = [(place, read_run(run, allow_python=allow_python)) for place, run in found]
    groups = _named(grouped(records), names or {})
    one = len(places) == 1 and places[0].is_dir()
    where = user_path(output) if output is not None else places[0] / REPORT if one else Path(COMPARISON)
    notes = dict.fromkeys(f"{record.name}: {note}" for _, record in records for note in record.notes)
    told = ", ".join(group.name for group in groups)
    page = Page(
        f"{places[0].resolve().name}: {len(groups)} recipes" if one else "Runs beside each other",
        f"{len(records)} runs: {told}." if len(told) < 300 else f"{len(records)} runs of {len(groups)} recipes.",
        tuple(notes),
        [
            Part("Figures", _words(groups), tables=[*tables, _figures(groups)]),
            Part("Curves", "A band is one standard deviation over the seeds.", charts=_curves(groups)),
            Part("What is not the same", tables=_differences(groups)),
        ],
        f"Written by kw_lightning, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ).html()
    write_page(where, page)
    return Report(where, page)


def find_runs(path: Path) -> list[Path]:
    """Return the runs that a path means: itself, or all in a folder of runs.

    Raises:
        RunError: there are none.
    """
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    if path.is_file() or _is_run(path):
        return [path]
    found = sorted(_below(path, DEEPEST), key=lambda run: [_natural(part) for part in run.relative_to(path).parts])
    if not found:
        raise RunError(f"{path}: no run, and none in the folders below: no {RECIPE_FILE} and no metrics.csv")
    return found


def is_folder_of_runs(path: Path) -> bool:
    """Tell whether a path is a folder with runs below it, and none itself."""
    return path.is_dir() and not _is_run(path) and any(True for _ in _below(path, DEEPEST))


def grouped(records: Sequence[tuple[Path, RunRecord]]) -> list[Group]:
    """Return the runs by recipe, in the order in which they come; those without a recipe alone.

    Args:
        records: runs, each with the path by which it was asked for.
    """
    groups: dict[str, list[tuple[Path, RunRecord]]] = {}
    for place, record in records:
        groups.setdefault(_kind(record), []).append((place, record))
    named: dict[str, Group] = {}
    for members in groups.values():
        name = _name(members)
        while name in named:
            name += "'"
        named[name] = Group(name, tuple(record for _, record in members))
    return list(named.values())


def _named(groups: Sequence[Group], names: Mapping[str, str]) -> list[Group]:
    order = {name: place for place, name in enumerate(names)}
    ordered = sorted(groups, key=lambda group: order.get(group.name, len(order)))
    return [Group(names.get(group.name, group.name), group.runs) for group in ordered]


def mean_series(name: str, lines: Sequence[Series]) -> Series:
    """Return the mean of lines at every place that any of them has, with the deviation over those that do."""
    at: dict[float, list[float]] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            at.setdefault(round(x, 6), []).append(y)
    places = sorted(at)
    deviation = [statistics.stdev(at[x]) if len(at[x]) > 1 else 0.0 for x in places] if len(lines) > 1 else []
    return Series(name, places, [statistics.fmean(at[x]) for x in places], deviation)


def _is_run(path: Path) -> bool:
    return (path / "metrics.csv").is_file() or ((path / RECIPE_FILE).is_file() and path.name != "model")


def _below(path: Path, depth: int) -> Iterator[Path]:
    for folder in path.iterdir() if depth else ():
        if folder.is_dir() and not folder.is_symlink():
            if _is_run(folder):
                yield folder
            else:
                yield from _below(folder, depth - 1)


def _natural(name: str) -> tuple[Any, ...]:
    """Return a key by which run-10 comes after run-9."""
    head = name.rstrip("0123456789")
    return (head, int(name[len(head) :] or 0), name)


def _kind(record: RunRecord) -> str:
    if record.recipe is None:
        return str(record.path.resolve())
    return json.dumps(_comparable(record), sort_keys=True, default=str)


def _comparable(record: RunRecord) -> dict[str, Any]:
    """Return a recipe without its names and its seed."""
    assert record.recipe is not None
    data = {key: value for key, value in record.recipe.document.data.items() if key not in _NAMES}
    train = data.get("train")
    if isinstance(train, Mapping):
        data["train"] = {key: value for key, value in train.items() if key != "seed"}
    return data


def _name(members: Sequence[tuple[Path, RunRecord]]) -> str:
    """Return the name of a group: its folder in a folder of runs, or the run's own."""
    place, record = members[0]
    try:
        inside = record.path.resolve().relative_to(place.resolve()).parts
    except ValueError:
        inside = ()
    if len(inside) > 1:
        return "/".join(inside[:-1])
    if len(members) > 1 and record.recipe is not None:
        return f"{record.recipe.name} ({record.name} …)"
    return record.name


def _words(groups: Sequence[Group]) -> str:
    if any(len(group.runs) > 1 for group in groups):
        return "Mean ± standard deviation over the runs of a recipe, which differ in their seed."
    return ""


def _figures(groups: Sequence[Group]) -> Table:
    found = [[measured_parts(run.result or {}) for run in group.runs] for group in groups]
    columns = [
        (part, key)
        for part in ("test", "val")
        for key, _ in ROWS
        if any(key in run.get(part, {}) for runs in found for run in runs)
    ]
    named = {"test": "test", "val": "validation, best"}
    head = ["recipe", "runs", "parameters", "multiply-adds"]
    head += [f"{_LABELS[key]} ({named[part]})" for part, key in columns]
    rows = []
    for group, runs in zip(groups, found, strict=True):
        plan = group.first.plan
        macs = plan.macs.kw if plan is not None and plan.macs is not None else None
        row = [group.name, str(len(runs)), f"{plan.parameters.kw:,}" if plan else "–", f"{macs:,}" if macs else "–"]
        row += [_spread([run[part][key] for run in runs if key in run.get(part, {})], key) for part, key in columns]
        rows.append(row)
    return Table("All runs", head, rows)


def _spread(values: Sequence[float], key: str) -> str:
    if not values:
        return "–"
    scale, unit = (1.0, "") if key == "loss" else (100.0, " %")
    digits = 4 if key == "loss" else 2
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{spread}{unit}"


def _curves(groups: Sequence[Group]) -> list[Chart]:
    """Return a chart for each metric that any run has, a line for each group."""
    lines: dict[str, dict[str, list[Series]]] = {}
    shares: dict[str, bool] = {}
    for group in groups:
        for run in group.runs:
            for _, percent, series in grouped_series(run.metrics):
                for one in series:
                    lines.setdefault(one.name, {}).setdefault(group.name, []).append(one)
                    shares[one.name] = percent
    return [
        line_chart(name, [mean_series(group, found) for group, found in by_group.items()], percent=shares[name])
        for name, by_group in sorted(lines.items(), key=lambda item: (not shares[item[0]], item[0]))
    ]


def _differences(groups: Sequence[Group]) -> list[Table]:
    """Return the keys of the recipes, and the figures of the plans, that are not the same in all groups."""
    known = [group for group in groups if group.first.recipe is not None]
    if len(known) < 2:
        return []
    recipes = [_comparable(group.first) for group in known]
    values: dict[str, list[Any]] = {}
    for place, other in enumerate(recipes[1:], start=1):
        for change in differences(recipes[0], other):
            row = values.setdefault(change.path, [change.before] * len(known))
            row[place] = change.after
    head = [group.name for group in known]
    rows = [[path, *map(_shown, row)] for path, row in values.items()]
    tables = [Table("Recipes", ["key", *head], rows, left=1 + len(head))] if rows else []
    plans = [(group, group.first.plan) for group in known if group.first.plan is not None]
    if len(plans) > 1:
        figures = different_figures(*(plan for _, plan in plans if plan is not None))
        texts = [[f"{value:,}" if isinstance(value, int) else str(value or "–") for value in row] for row in figures]
        if texts:
            tables.append(Table("Plans", ["figure", *(group.name for group, _ in plans)], texts))
    return tables


def _shown(value: Any) -> str:
    return "–" if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
