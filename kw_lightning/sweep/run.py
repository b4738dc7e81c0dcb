"""A sweep from the beginning to its table: grid, checks, runs that are not there yet, results."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from kw_lightning.callbacks.signals import InterruptedRunError
from kw_lightning.errors import RunError, printable
from kw_lightning.fit.changes import in_words
from kw_lightning.fit.folder import RUNS
from kw_lightning.paths import user_path
from kw_lightning.recipe import Recipe, load_recipe, lock_text
from kw_lightning.recipe.comparison import differences
from kw_lightning.recipe.types import Train
from kw_lightning.sweep import table
from kw_lightning.sweep.chart import draw
from kw_lightning.sweep.checking import check_rows
from kw_lightning.sweep.folder import MANIFEST, Manifest, SweepFolder, read_result, wait_for_end
from kw_lightning.sweep.grid import SEED, Grid
from kw_lightning.sweep.loading import load_rows
from kw_lightning.sweep.processes import STOPPED, Begin, Job, kw, run_all
from kw_lightning.sweep.results import Results, figures_of, read_results

log = logging.getLogger(__name__)
Tell = Callable[[str], None]
CHART = "accuracy.svg"


@dataclass(frozen=True)
class Outcome:
    """A sweep that came to its end.

    Attributes:
        folder: of the sweep.
        results: of all rows.
        failed: the runs that failed, by row and seed, each with what it said last.
    """

    folder: Path
    results: Results
    failed: dict[tuple[str, int], str]


def sweep(
    source: Grid | Path,
    *,
    output: str | Path | None = None,
    jobs: int = 1,
    begin: Begin | None = None,
    allow_python: Sequence[str] = (),
    tell: Tell = log.info,
) -> Outcome:
    """Make the runs of a grid that are not there yet, and write its table.

    Args:
        source: the grid, **or** the folder of a sweep that goes on.
        output: the folder; by default `runs/NAME-sweep` of the first recipe.
        jobs: how many runs at a time.
        begin: begins a run, see `kw_lightning.sweep.engines`; by default as a process of this machine.
        allow_python: packages whose code the recipes may name.
        tell: hears what happens, a line each.

    Raises:
        RecipeError: mistakes of any row, before the first run.
        RunError: a folder of another sweep, or one that is in use.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
        InterruptedRunError: SIGTERM; the same.
    """
    if isinstance(source, Grid):
        recipes = load_rows(source.rows)
        folder = SweepFolder(user_path(output or default_folder(source)))
        entries = check_rows(source.rows, recipes, allow_python=allow_python)
        name = re.sub(r"-sweep$", "", folder.path.name)
        manifest = Manifest(name, metric_of(recipes[0]), source.seeds, tuple(entries))
    else:
        folder, manifest = open_sweep(source)
    folder.claim()
    try:
        if isinstance(source, Grid):
            lay_down(folder, manifest, recipes, tell)
        left = open_jobs(folder, manifest, allow_python)
        watcher = Told(folder, manifest, left, tell)
        total = len(manifest.rows) * len(manifest.seeds)
        if len(left) < total:
            tell(f"{total - len(left)} of {total} runs are finished")
        try:
            run_all(left, jobs, watcher, begin)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Interrupted; kw sweep {folder.path} goes on") from None
        except InterruptedRunError as stop:
            raise InterruptedRunError(f"Interrupted; kw sweep {folder.path} goes on", stop.signal) from None
        finally:
            results = write_table(folder, manifest)
    finally:
        folder.release()
    return Outcome(folder.path, results, watcher.failed)


def default_folder(grid: Grid) -> Path:
    """Return `runs/NAME-sweep`, which the same command finds again."""
    return RUNS / f"{PurePath(grid.rows[0].recipe).stem}-sweep"


def metric_of(recipe: Recipe) -> str:
    """Return what a recipe chooses its checkpoint by; its main metric where that is none of the validation images."""
    part, _, metric = (recipe.train or Train()).monitor.partition("/")
    return metric if part == "val" else "map" if recipe.several else "accuracy"


def open_sweep(path: Path) -> tuple[SweepFolder, Manifest]:
    """Return the folder of a sweep, and its grid.

    Raises:
        RunError: there is none.
    """
    folder = SweepFolder(path)
    manifest = folder.manifest()
    if manifest is None:
        there = f"no {MANIFEST} in this folder" if path.is_dir() else "no such folder"
        raise RunError(f"{path}: {there}; a recipe or the folder of a sweep is needed")
    return folder, manifest


def lay_down(folder: SweepFolder, manifest: Manifest, recipes: Sequence[Recipe], tell: Tell) -> None:
    """Write the grid and its recipes into the folder, and say what has changed since the last time.

    Raises:
        RunError: a row that has runs already was another recipe then.
    """
    before = folder.manifest()
    changed = []
    for entry, recipe in zip(manifest.rows, recipes, strict=True):
        file = folder.recipe(entry.name)
        if file.exists() and folder.started(entry.name):
            found = list(differences(load_recipe(file).document.data, recipe.document.data))
            if found:
                changed.append(f"{entry.label}: {in_words(found)}")
    if changed:
        more = f", and {len(changed) - 1} more rows" if len(changed) > 1 else ""
        raise RunError(
            f"{folder.path} holds runs of another recipe: {changed[0]}{more}. Give another folder with --output, or "
            "remove that one; kw sweep FOLDER goes on with the recipes as they were"
        )
    if before is not None:
        _tell_changes(before, manifest, tell)
    for entry, recipe in zip(manifest.rows, recipes, strict=True):
        if not folder.started(entry.name):
            folder.write(f"recipes/{entry.name}.yaml", lock_text(recipe))
    folder.write(MANIFEST, manifest.text())


def _tell_changes(before: Manifest, after: Manifest, tell: Tell) -> None:
    names = {entry.name for entry in before.rows}, {entry.name for entry in after.rows}
    new, gone = names[1] - names[0], names[0] - names[1]
    if new or gone:
        left = f"; {len(gone)} are no longer in it: their runs stay, and the table leaves them out" if gone else ""
        tell(f"the grid has changed: {len(new)} new rows{left}")
    if before.seeds != after.seeds:
        were, are = (", ".join(map(str, seeds)) for seeds in (before.seeds, after.seeds))
        tell(f"the seeds have changed: {were} before, {are} now")


def open_jobs(folder: SweepFolder, manifest: Manifest, allow_python: Sequence[str] = ()) -> list[Job]:
    """Return the runs that are to be made or finished: every row with the first seed, then with the next.

    Raises:
        RunError: another process trains one of them.
    """
    jobs = []
    for seed in manifest.seeds:
        for entry in manifest.rows:
            if folder.finished(entry.name, seed):
                continue
            run = folder.run(entry.name, seed)
            wait_for_end(run)
            command = ["fit", str(folder.recipe(entry.name)), f"{SEED}={seed}", "--output", str(run)]
            command += ["--resume", "auto"]
            for package in allow_python:
                command += ["--allow-python", package]
            jobs.append(Job(entry.name, seed, kw(*command), folder.log(entry.name, seed)))
    return jobs


@dataclass
class Told:
    """Tells what happens to the runs, and keeps which failed."""

    folder: SweepFolder
    manifest: Manifest
    jobs: Sequence[Job]
    tell: Tell
    failed: dict[tuple[str, int], str] = field(default_factory=dict)

    def started(self, job: Job) -> None:
        """Say which run has begun."""
        goes_on = any((self.folder.run(job.row, job.seed) / "checkpoints").glob("*.ckpt"))
        self.tell(f"{self._label(job)}: {'goes on' if goes_on else 'started'}")

    def ended(self, job: Job, code: int, seconds: float) -> None:
        """Say what a run has come to."""
        if code == 0:
            metric = self.manifest.metric
            found = figures_of(read_result(self.folder.run(job.row, job.seed)) or {}, metric)
            unit = "" if metric in table.PLAIN else " %"
            figures = [f"{table.NAMES[part]} {metric} {table.figure(metric, v)}{unit}" for part, v in found.items()]
            self.tell(f"{self._label(job)}: {', '.join([*figures, f'{seconds:.0f} s'])}")
        elif code in STOPPED:
            self.tell(f"{self._label(job)}: interrupted")
        else:
            said = last_line(job.log)
            self.failed[job.row, job.seed] = said
            self.tell(f"{self._label(job)}: failed with exit code {code}: {said} (all of it: {job.log})")

    def waiting(self, running: Sequence[Job]) -> None:
        """Say nothing while runs are at work."""

    def _label(self, job: Job) -> str:
        (entry,) = (entry for entry in self.manifest.rows if entry.name == job.row)
        number = f"{self.jobs.index(job) + 1}/{len(self.jobs)}"
        return printable(f"{number} {entry.label}, seed {job.seed}")


def last_line(log: Path) -> str:
    """Return the last line that a run printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return printable(lines[-1].strip()) if lines else "it said nothing"


def write_table(folder: SweepFolder, manifest: Manifest) -> Results:
    """Write the table and the chart of what is finished, and return the results."""
    results = read_results(folder, manifest)
    folder.write("table.md", table.markdown(results))
    folder.write("table.csv", table.csv_text(results))
    folder.write("table.json", table.json_of(results, folder))
    if results.parts:
        folder.write(CHART, draw(results))
    return results
