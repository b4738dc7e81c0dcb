"""What a run folder says of its run, without a network and without data."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kw_lightning.callbacks.attention_metric import DEAD, AttentionSummary
from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.callbacks.checkpoint_io import read
from kw_lightning.errors import KWError, RunError, first_line
from kw_lightning.fit.by_class import ClassMetrics
from kw_lightning.fit.folder import RECIPE_FILE, folder_of
from kw_lightning.fit.metrics import Row, read_metrics
from kw_lightning.paths import whole
from kw_lightning.planning import Plan, plan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.types import Recipe
from kw_lightning.report.attention import Array, LayerAttention, WarehouseAttention

log = logging.getLogger(__name__)

CONFUSION, CLASSES = "confusion.csv", "classes.csv"
MOST_BYTES = 64 * 2**20
"""Of a file that is read."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells of it; what the folder does not hold is empty.

    Attributes:
        path: the folder.
        recipe: of the run.
        plan: of the recipe.
        metrics: the rows of `metrics.csv`.
        result: `result.json`.
        versions: `versions.json`.
        bench: what `kw bench --json` said of the recipe, from `bench.json`.
        notes: what could not be read, a line each.
    """

    path: Path
    recipe: Recipe | None = None
    plan: Plan | None = None
    metrics: Sequence[Row] = ()
    result: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.resolve().name

    @property
    def hash(self) -> str:
        """Return the hash of the recipe's content, as the lock has it."""
        return content_hash(dict(self.recipe.document.data)) if self.recipe is not None else ""


def read_run(path: Path, planned: Plan | None = None, *, allow_python: Sequence[str] = ()) -> RunRecord:
    """Read a run folder, or the folder that a checkpoint lies in.

    Args:
        path: the folder, **or** a checkpoint, whose recipe is taken where the folder has none.
        planned: the plan of the run, where it is known.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: nothing of a run is there.
    """
    folder = folder_of(path).path if path.is_file() else path
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    notes: list[str] = []
    metrics = read_metrics(folder / "metrics.csv")
    recipe = planned.recipe if planned is not None else _recipe(folder, path, notes)
    if planned is None and recipe is not None:
        planned = _plan(recipe, allow_python, notes)
    if recipe is None and not metrics:
        raise RunError(f"{path}: no run: neither {RECIPE_FILE} nor metrics.csv nor a checkpoint with a recipe is here")
    found = {name: _json(folder / f"{name}.json", notes) for name in ("result", "versions", "bench")}
    return RunRecord(folder, recipe, planned, metrics, **found, notes=tuple(notes))


def read_attention(record: RunRecord) -> tuple[WarehouseAttention, ...]:
    """Return the mean attention that `log: {attention: …}` wrote last, of a run whose plan is known.

    Shares of negative weights and differences between samples are those of `metrics.csv`.
    """
    files = sorted((record.path / "attention").glob("epoch=*.npz"))
    if not files or record.plan is None:
        return ()
    try:
        with np.load(files[-1], allow_pickle=False) as arrays:
            means = {warehouse.name: arrays[warehouse.name] for warehouse in record.plan.warehouses}
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("%s cannot be read: %s", files[-1], first_line(error))
        return ()
    found = []
    for warehouse in record.plan.warehouses:
        shares = {layer.name: layer.partition for layer in warehouse.layers}
        mean = means[warehouse.name]
        if mean.shape == (warehouse.partition.mixtures, warehouse.partition.cells):
            layers = _layers(mean, shares)
            found.append(WarehouseAttention(warehouse.name, _summary(record, warehouse.name, mean), layers))
    return tuple(found)


def read_classes(record: RunRecord) -> tuple[Array | None, tuple[str, ...]]:
    """Return the confusion matrix that an earlier report wrote, and the names of its classes."""
    try:
        rows = list(csv.reader(io.StringIO((record.path / CONFUSION).read_text(encoding="utf-8"))))
        counts = np.array([[int(value) for value in row[1:]] for row in rows[1:]])
        if counts.ndim == 2 and counts.shape[0] == counts.shape[1] == len(rows[0]) - 1:
            return counts, tuple(rows[0][1:])
    except (OSError, ValueError, IndexError, csv.Error):
        pass
    return None, ()


def write_classes(folder: Path, classes: Sequence[ClassMetrics], confusion: Array | None) -> None:
    """Write `classes.csv`, a row a class, and `confusion.csv`, a row a class and a column for each it was taken for."""
    if classes:
        columns = list(classes[0])
        rows = [["" if entry[key] is None else entry[key] for key in columns] for entry in classes]
        _write(folder / CLASSES, [columns, *rows])
    if confusion is not None:
        names = [str(entry["name"]) for entry in classes] or list(map(str, range(len(confusion))))
        _write(
            folder / CONFUSION,
            [["class", *names], *([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))],
        )


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with whole(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", errors="replace", newline="")


def _recipe(folder: Path, path: Path, notes: list[str]) -> Recipe | None:
    try:
        if (folder / RECIPE_FILE).is_file():
            return load_recipe(folder / RECIPE_FILE)
        if path.is_file():
            state = read(path)
            entries = state.get(KEY) if isinstance(state, Mapping) else None
            entry = entries[0] if isinstance(entries, list) and entries else None
            parameters = state.get("hyper_parameters") if isinstance(state, Mapping) else None
            for source in (parameters, entry):
                found = source.get("recipe") if isinstance(source, Mapping) else None
                if isinstance(found, Mapping):  # a text would be a file of the checkpoint's choice
                    return load_recipe(found)
    except KWError as error:
        notes.append(f"The recipe cannot be read: {first_line(error)}")
    return None


def _plan(recipe: Recipe, allow_python: Sequence[str], notes: list[str]) -> Plan | None:
    if recipe.model is None or not (recipe.model.backbone or recipe.model.layers):
        notes.append(
            "The recipe names no network, so there is no plan of it: KWCallback got the network from elsewhere."
        )
        return None
    try:
        return plan(recipe, allow_python=allow_python)
    except KWError as error:
        notes.append(f"The plan cannot be made: {first_line(error)}")
        return None


def _json(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("the file is very large")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a map")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {first_line(error)}")
        return None


def _layers(mean: Array, shares: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    layers, first = [], 0
    for name, share in shares.items():
        use = np.abs(mean[first : first + share.mixtures]).sum(axis=0)
        negative = float((mean[first : first + share.mixtures] < 0).mean())
        layers.append(LayerAttention(name, share, negative, int((use >= DEAD * use.mean()).sum()), None))
        first += share.mixtures
    return tuple(layers)


def _summary(record: RunRecord, warehouse: str, mean: Array) -> AttentionSummary:
    use = np.abs(mean).sum(axis=0)
    logged: dict[str, float] = {}
    for row in record.metrics:
        prefix = f"attention/{warehouse}/"
        logged |= {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
    return AttentionSummary(
        mean=torch.from_numpy(mean).float(),
        negative_share=logged.get("negative_share", float((mean < 0).mean())),
        entropy=logged.get("entropy", float("nan")),
        effective_cells=logged.get("effective_cells", float("nan")),
        dead_cells=int(logged.get("dead_cells", (use < DEAD * use.mean()).sum())),
        similarity=logged.get("similarity", float("nan")),
    )
