"""The report of a run: gathered, written as `report.html` with its tables beside it, and shown in a notebook."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule

from kw_lightning.errors import KWError, RecipeError, RunError, first_line
from kw_lightning.fit.by_class import ClassMetrics
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.evaluation import Opened, evaluate_opened, open_checkpoint, parts_of
from kw_lightning.fit.folder import RunFolder, readable_errors
from kw_lightning.paths import user_path, whole
from kw_lightning.planning import Plan
from kw_lightning.preprocessing import Preprocessing, preprocessing, resolved_section
from kw_lightning.recipe.types import Recipe
from kw_lightning.report import parts
from kw_lightning.report.charts import Chart
from kw_lightning.report.observation import Observation, Observed
from kw_lightning.report.page import Page, Part
from kw_lightning.report.pictures import Normalisation
from kw_lightning.report.record import RunRecord, read_attention, read_classes, read_run, write_classes

log = logging.getLogger(__name__)

Written = TypeVar("Written")
REPORT = "report.html"
TRAINING_IMAGES = 20


@dataclass(frozen=True)
class Report:
    """A page that was written; a notebook shows it.

    Attributes:
        path: the file.
        html: what is in it.
        charts: those that trackers show too.
    """

    path: Path
    html: str = field(repr=False)
    charts: tuple[Chart, ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        return f'<iframe title="report" srcdoc="{page}" style="width: 100%; height: 40rem; border: 0"></iframe>'


@dataclass(frozen=True)
class Findings:
    """What a pass over the data gave besides what the run folder holds.

    Attributes:
        observed: what was seen of the pass; None where there was none.
        part: of the data, as "test"; empty where there was none.
        classes: the metrics of each class.
        training: images as they train, [channels, height, width] each.
        steps: what images went through in evaluation.
        notes: why something is missing, a line each.
    """

    observed: Observed | None = None
    part: str = ""
    classes: Sequence[ClassMetrics] = ()
    training: Sequence[torch.Tensor] = ()
    steps: Preprocessing | None = None
    notes: tuple[str, ...] = ()


def report(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    output: str | Path | None = None,
    allow_python: Sequence[str] = (),
) -> Report:
    """Write the report of a run: of its folder, or of a checkpoint and the folder that this lies in.

    What needs the data is left out where the data is not there, with a note that says so.

    Args:
        path: the folder or the checkpoint; of a folder the chosen checkpoint is looked at.
        overrides: changes to the recipe inside, as `data.root=/elsewhere`.
        split: part of the data that is looked at: "train", "val" or "test"; by default "test" where it is open, or else
            "val".
        output: the page; by default `report.html` in the run folder. Its tables are written beside it.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: nothing of a run is there, a part that the data does not have, **or** a file that cannot be written.
        RecipeError: an override that cannot be used.
    """
    place = user_path(path)
    record = read_run(place, allow_python=allow_python)
    try:
        opened = open_checkpoint(place, overrides, allow_python=allow_python)
    except RecipeError as error:
        if overrides:
            raise
        findings = _without_data(record, error)
    except RunError as error:
        findings = _without_data(record, error)
    else:
        findings = _look(opened, split)
        if record.plan is None:
            record = read_run(place, opened.module.plan)
    return write_report(record, findings, user_path(output) if output is not None else record.path / REPORT)


def report_of_run(
    folder: RunFolder,
    planned: Plan,
    data: LightningDataModule,
    observation: Observation,
    part: str,
    classes: Sequence[ClassMetrics],
) -> Report:
    """Write the report at the end of a run, of the pass over the data that was watched then.

    Args:
        folder: of the run, with all that it will hold.
        planned: the run's plan.
        data: of the run.
        observation: watched the chosen checkpoint.
        part: of the data that it was measured on; empty where it was not.
        classes: the metrics of each class.
    """
    record = read_run(folder.path, planned)
    recipe = planned.recipe
    nothing = () if part else ("There are neither validation nor test images, so nothing was measured.",)
    notes = (*nothing, *_failure(observation))
    findings = Findings(observation.observed, part, classes, _training_images(data), preprocessing(recipe), notes)
    return write_report(record, findings, folder.path / REPORT)


def write_report(record: RunRecord, findings: Findings, output: Path) -> Report:
    """Write a page, and `classes.csv` and `confusion.csv` beside it.

    Raises:
        RunError: a file cannot be written.
    """
    made = _parts(record, findings)
    description = record.recipe.description if record.recipe is not None else ""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written by kw_lightning, {written}, from {record.name}."
    title = record.name if record.recipe is None else f"{record.name}: {record.recipe.name}"
    page = Page(title, description, (*record.notes, *findings.notes), made, footer).html()
    observed = findings.observed
    write_page(output, page)
    with readable_errors(output.parent):
        write_classes(output.parent, findings.classes, observed.confusion if observed is not None else None)
    return Report(output, page, tuple(chart for part in made for chart in part.charts if chart.key))


def write_page(output: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    with readable_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole(output) as partial:
            partial.write_text(page, encoding="utf-8")


def _parts(record: RunRecord, findings: Findings) -> list[Part]:
    observed = findings.observed
    classes: Any = findings.classes or (record.result or {}).get("classes") or ()
    classes = [entry for entry in classes if isinstance(entry, dict)] if isinstance(classes, list | tuple) else []
    if observed is not None:
        confusion, attention = observed.confusion, observed.attention
    else:
        confusion, names = read_classes(record)
        classes = classes or [{"name": name} for name in names]
        attention = read_attention(record)
    evaluated = _normalisation(findings.steps)
    trained = _training_normalisation(record.recipe) or evaluated
    return [
        parts.summary(record),
        parts.curves(record),
        parts.answers(observed, confusion, classes, findings.part or _measured_part(record), evaluated),
        parts.training_images(findings.training, trained),
        parts.attention(attention, record, findings.part),
        parts.origins(record),
    ]


def _look(opened: Opened, split: str | None) -> Findings:
    observation = Observation()
    notes: tuple[str, ...] = ()
    part, classes = "", tuple[ClassMetrics, ...]()
    recipe = opened.module.recipe
    closed = recipe.data is not None and not recipe.data.test and "val" in parts_of(opened.data)
    try:
        found = evaluate_opened(opened, "val" if split is None and closed else split, [observation])
        part, classes = found.split, found.classes
    except RunError as error:
        if split is not None:
            raise
        notes = (f"Nothing was measured: {first_line(error)}",)
    steps = preprocessing(recipe)
    notes += _failure(observation)
    return Findings(observation.observed, part, classes, _training_images(opened.data), steps, notes)


def _failure(observation: Observation) -> tuple[str, ...]:
    error = observation.failure
    return (f"Answers and attention were not watched: {type(error).__name__}: {first_line(error)}",) if error else ()


def _without_data(record: RunRecord, error: KWError) -> Findings:
    steps = preprocessing(record.recipe) if record.recipe is not None else None
    return Findings(steps=steps, notes=(f"Checkpoint and data were not looked at: {first_line(error)}",))


def _training_images(data: LightningDataModule) -> list[torch.Tensor]:
    """Return some images evenly over the training part, as they train in the first epoch; none of other data."""
    if not isinstance(data, ImageData) or "train" not in data.parts:
        return []
    images = data.parts["train"]
    count = min(TRAINING_IMAGES, len(images))
    if not count:
        return []
    places = torch.linspace(0, len(images) - 1, count).round().int().tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        found, targets = images.read(places)
        mixed = data.mix(found, targets)[0] if data.mix is not None else found
    return list(mixed)


def _normalisation(steps: Preprocessing | None) -> Normalisation:
    return Normalisation(steps.mean or (), steps.std or ()) if steps is not None else Normalisation()


def _training_normalisation(recipe: Recipe | None) -> Normalisation | None:
    if recipe is None or recipe.data is None:
        return None
    options = resolved_section(recipe, "train")
    return Normalisation(options.get("mean") or (), options.get("std") or ())


def _measured_part(record: RunRecord) -> str:
    result = record.result or {}
    return "test" if result.get("test") else "val" if result.get("val") else ""


def attempt(write: Callable[[], Written]) -> Written | None:
    """Return what was written; where that fails, for whatever reason, None after one warning: a trained run has not."""
    try:
        return write()
    except Exception as error:
        log.warning("the report could not be made: %s: %s", type(error).__name__, first_line(error))
        return None
