"""The end of training from a recipe: the checkpoints measured, and what the run folder then holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule, Trainer

from kw_lightning.callbacks.figures import publish
from kw_lightning.fit.by_class import ClassMetrics
from kw_lightning.fit.early_stopping import stopping_note
from kw_lightning.fit.evaluation import load_classifier, measure, parts_of, read_checkpoint
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.report import json_text, metrics_table
from kw_lightning.nn.adapter import count_trainable
from kw_lightning.notebook import rich_html
from kw_lightning.recipe.types import Recipe

if TYPE_CHECKING:
    from kw_lightning.report.observation import Observation


@dataclass(frozen=True)
class Result:
    """A run that ended.

    Attributes:
        folder: the run folder.
        last: `accuracy`, `top5` (0 to 1) and `loss` of the trained network on the validation images, of several labels
            an image `map`, `f1`, `exact` and `loss`; empty where there are none, and in processes but the first.
        best: the same of the best checkpoint, chosen by `train.monitor` on the same images: an optimistic figure.
        test: the same of the chosen checkpoint, the best one or else the last, on the test images, if there are any.
        module: the trained network in its LightningModule.
        note: in a line, that the run ended early and where its learning rate stood; None where it did not.
        report: the page that was written; None where `log.report` is false, and in processes but the first.
    """

    folder: Path
    last: dict[str, float]
    best: dict[str, float]
    test: dict[str, float]
    module: Classifier
    note: str | None = None
    report: Path | None = None

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Return the metrics that there are by part and checkpoint, as "val, best"."""
        found = {"val, last": self.last, "val, best": self.best, "test, chosen": self.test}
        return {name: metrics for name, metrics in found.items() if metrics}

    def _repr_html_(self) -> str:
        places = [f"run folder: {self.folder}", *([f"report: {self.report}"] if self.report is not None else [])]
        return rich_html(*([metrics_table(self.columns, self.note)] if self.columns else []), *places)


def finish(
    trainer: Trainer, module: Classifier, data: LightningDataModule, folder: RunFolder, allow_python: Sequence[str]
) -> Result:
    """Measure the checkpoints, so that `kw evaluate` gives the same, and write `result.json` and `model/`.

    The test part is opened here, once, for the checkpoint that is chosen by then; not with `data.test: false`.
    """
    # The first process tells all: those of torchrun do not know how it numbered its folder.
    if not trainer.strategy.broadcast(folder.last.exists()):  # no epoch was trained
        trainer.save_checkpoint(folder.last)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # from here on the first process works alone
    if not trainer.is_global_zero:
        return Result(folder.path, {}, {}, {}, module)
    last, chosen = (
        load_classifier(read_checkpoint(path), path, planned=module.plan, allow_python=allow_python)
        for path in (folder.last, folder.chosen)
    )
    watching = _observers(module.recipe)
    last_on_val, best_on_val, tested = _measure(last, chosen, data, watching)
    measured: dict[str, dict[str, dict[str, float]]] = {}
    if last_on_val:
        measured["val"] = {"last": last_on_val, "best": best_on_val}
    if tested:
        measured["test"] = {folder.chosen.stem: tested}
        logged = {f"test/{key}": value for key, value in tested.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=max(trainer.global_step - 1, 0))
            logger.save()
    trainable, parameters = count_trainable(module.network)
    classes = chosen.by_class(getattr(data, "classes", None) or ())
    written = {
        "parameters": parameters,
        "trainable": trainable,
        "checkpoint": folder.chosen.name,
        **measured,
        "classes": classes,
    }
    folder.write("result.json", json_text(written, indent=2) + "\n")
    # It reads images by `fit.data`: at the top this would be a circle.
    from kw_lightning.inference.checkpoint import load_trained

    note = stopping_note(trainer)
    own = {"val": best_on_val, "test": tested}
    load_trained(folder.chosen, planned=module.plan, allow_python=allow_python).save_pretrained(
        folder.path / "model", metrics={part: metrics for part, metrics in own.items() if metrics}
    )
    seen = next(reversed(measured), "")
    report = _report(trainer, module, data, folder, watching, seen, classes) if watching else None
    return Result(folder.path, last_on_val, best_on_val, tested, module, note, report)


def _measure(
    last: Classifier, chosen: Classifier, data: LightningDataModule, watching: Sequence[Observation]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return the metrics of the last and the chosen checkpoint on the validation images, and of this on the test ones.

    Those of images that there are none of, or that the recipe leaves closed, are empty.
    """
    parts, settings = parts_of(data), chosen.recipe.data
    last_on_val = measure(last, data, "val") if "val" in parts else {}
    best_on_val = measure(chosen, data, "val", watching) if last_on_val else {}
    opens_test = settings is None or settings.test
    tested = measure(chosen, data, "test", watching) if "test" in parts and opens_test else {}
    return last_on_val, best_on_val, tested


def _observers(recipe: Recipe) -> list[Observation]:
    if not recipe.log.report:
        return []
    from kw_lightning.report.observation import Observation

    return [Observation()]


def _report(
    trainer: Trainer,
    module: Classifier,
    data: LightningDataModule,
    folder: RunFolder,
    watching: Sequence[Observation],
    part: str,
    classes: Sequence[ClassMetrics],
) -> Path | None:
    """Write the report and show its figures in the run's trackers; what fails there fails no run."""
    from kw_lightning.report.writing import attempt, report_of_run

    written = attempt(lambda: report_of_run(folder, module.plan, data, watching[0], part, classes))
    if written is None:
        return None
    figures = {chart.key: chart.figure for chart in written.charts if chart.figure is not None}
    attempt(lambda: publish(trainer.loggers, figures, trainer.global_step))
    return written.path
