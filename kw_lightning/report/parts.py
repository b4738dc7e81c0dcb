"""The parts of a run's page: what there is of each is shown, the rest is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kw_lightning.callbacks.heat_map import MOST_PIXELS
from kw_lightning.errors import times
from kw_lightning.fit.by_class import ClassMetrics, worst
from kw_lightning.fit.report import ROWS
from kw_lightning.planning import Plan
from kw_lightning.planning.types import budget_text
from kw_lightning.recipe.variables import escape
from kw_lightning.recipe.writing import to_yaml
from kw_lightning.report.attention import Array, WarehouseAttention
from kw_lightning.report.charts import (
    Chart,
    Series,
    confusion_chart,
    heat_map_chart,
    histogram_chart,
    line_chart,
)
from kw_lightning.report.observation import Answer, Observed
from kw_lightning.report.page import Gallery, Part, Picture, Table, Text, Tile
from kw_lightning.report.pictures import Normalisation, data_address
from kw_lightning.report.record import RunRecord

PAGE_VALUES = 600_000
"""Of all heat maps of a page together: some 3 MB as pictures and as values to be read."""
SHOWN_CLASSES, SHOWN_CONFUSIONS, DRAWN_CLASSES = 40, 12, 300
PART_NAMES = {"train": "training images", "val": "validation images", "test": "test images"}


def summary(record: RunRecord) -> Part:
    """Return what the network reached, and its size beside the static one's."""
    tiles = []
    result = record.result or {}
    for part, checkpoint, metrics in _measured(result):
        where = f"{part}, {checkpoint}"
        tiles += [
            Tile(f"{label} ({where})", f"{metrics[key]:.4f}" if key == "loss" else f"{metrics[key]:.2%}")
            for key, label in ROWS
            if _is_number(metrics.get(key)) and (key != "top5" or part == "test")
        ]
    planned = record.plan
    if planned is not None:
        tiles.append(_beside("parameters", planned.parameters.kw, planned.parameters.static))
        if planned.macs is not None:
            tiles.append(_beside("multiply-adds", planned.macs.kw, planned.macs.static))
    epochs = max((int(row["epoch"]) + 1 for row in record.metrics if _is_number(row.get("epoch"))), default=0)
    if epochs:
        steps = max((int(row["step"]) + 1 for row in record.metrics), default=0)
        tiles.append(Tile("epochs", str(epochs), f"{steps:,} steps"))
    return Part("Summary", tiles=tiles)


def curves(record: RunRecord) -> Part:
    """Return the curves of loss, accuracy, learning rate and temperature, and the epochs as a table."""
    charts = [
        line_chart(title, series, percent=percent)
        for title, percent, series in grouped_series(record.metrics)
        if any(len(one.y) for one in series)
    ]
    return Part("Training", charts=charts, tables=[table] if (table := _epochs(record)) is not None else [])


def grouped_series(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, bool, list[Series]]]:
    """Return the lines of metrics by chart: its title, whether its values are shares, and its lines.

    Steps are told in epochs, by the last row of each.
    """
    per_epoch = steps_of_an_epoch(metrics)
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        for key, value in row.items():
            if key not in ("step", "epoch") and not key.startswith(("test/", "test_")):
                columns.setdefault(key, []).append(((row["step"] + 1) / per_epoch, value))
    found: dict[str, list[Series]] = {"Loss": [], "Accuracy": [], "Learning rate": [], "Temperature": []}
    for key in sorted(columns):
        title = _chart_of(key)
        if title is not None:
            x, y = zip(*columns[key], strict=True)
            found[title].append(Series(key, x, y))
    return [(title, title == "Accuracy", series) for title, series in found.items() if series]


def steps_of_an_epoch(metrics: Sequence[Mapping[str, float]]) -> float:
    """Return the optimizer steps of an epoch, by the rows that end one; 1 where no row says."""
    ends: dict[int, float] = {}
    for row in metrics:
        if _is_number(row.get("epoch")):
            ends[int(row["epoch"])] = max(ends.get(int(row["epoch"]), 0.0), row["step"] + 1)
    return max((end / (epoch + 1) for epoch, end in ends.items()), default=1.0)


def answers(
    observed: Observed | None,
    confusion: Array | None,
    classes: Sequence[ClassMetrics],
    part: str,
    normalisation: Normalisation,
) -> Part:
    """Return how well each class is recognised, what it is taken for, and the images with the highest loss.

    Args:
        observed: the pass over the images; None where there was none.
        confusion: images of each class by what they were taken for.
        classes: the metrics of each class.
        part: of the data, as "test".
        normalisation: of the images.
    """
    names = [str(entry.get("name", number)) for number, entry in enumerate(classes)]
    names += [str(number) for number in range(len(names), len(confusion) if confusion is not None else 0)]
    charts, tables = [], []
    if confusion is not None and confusion.sum():
        if len(confusion) <= DRAWN_CLASSES:
            charts.append(confusion_chart(confusion, names))
        tables.append(_confusions(confusion, names))
    if classes:
        tables.insert(0, _classes(classes))
    gallery = [_answer(answer, names, normalisation) for answer in observed.worst] if observed is not None else []
    galleries = [Gallery(f"The {len(gallery)} images with the highest loss", gallery)] if gallery else []
    count = f"{observed.images:,} " if observed is not None else ""
    return Part(
        "Answers",
        f"Over the {count}{PART_NAMES.get(part, 'images')}.",
        (),
        charts,
        galleries,
        [t for t in tables if t.rows],
    )


def training_images(images: Sequence[Tensor], normalisation: Normalisation) -> Part:
    """Return images as the network is trained with them."""
    found = [data_address(image, normalisation) for image in images]
    shown = [Picture(source, f"Training image {k + 1}", "") for k, source in enumerate(found) if source is not None]
    words = "A sample, augmented as in the first epoch, and mixed where the recipe mixes."
    return Part("Training images as the network sees them", words, galleries=[Gallery("", shown)] if shown else [])


def attention(found: Sequence[WarehouseAttention], record: RunRecord, part: str) -> Part:
    """Return a heat map and a histogram for each warehouse, and a table of the layers."""
    charts: list[Chart] = []
    for warehouse in found:
        histogram = histogram_chart(warehouse)
        charts += [
            heat_map_chart(warehouse, min(MOST_PIXELS, PAGE_VALUES // len(found))),
            *([histogram] if histogram is not None else []),
        ]
    if not found:
        words = ""
    else:
        words = (
            f"Mean of α over the {PART_NAMES.get(part, 'validation images')}: red above 0, blue under 0; dots mark the "
            "cell that each mixture started as. A cell is dead when it is used less than a hundredth of the average."
        )
    tables = [warehouses_table(found), layers_table(found, record)] if found else []
    return Part("What the warehouses learnt", words, charts=charts, tables=tables)


def origins(record: RunRecord) -> Part:
    """Return recipe, plan and versions, and what the run is known by."""
    texts, tables = [], []
    if record.plan is not None and record.plan.warehouses:
        tables.append(plan_table(record.plan))
    versions = {key: str(value) for key, value in (record.versions or {}).items()}
    if record.hash:
        versions["recipe, SHA-256"] = record.hash
    if versions:
        tables.append(Table("Made with", ("what", "version"), list(versions.items()), left=2))
    if record.recipe is not None:
        texts.append(Text("The recipe, resolved", to_yaml(escape(record.recipe.document.data))))
    return Part("Recipe, plan and versions", tables=tables, texts=texts)


def plan_table(planned: Plan) -> Table:
    """Return the warehouses of a plan."""
    head = ("warehouse", "layers", "cell", "mixtures", "cells", "budget", "cell parameters", "attention")
    rows = [
        (
            warehouse.name,
            str(len(warehouse.layers)),
            times(warehouse.partition.cell_shape),
            f"{warehouse.partition.mixtures:,}",
            f"{warehouse.partition.cells:,}",
            budget_text(warehouse.asked),
            f"{warehouse.cell_parameters:,}",
            f"{warehouse.attention_parameters:,}",
        )
        for warehouse in planned.warehouses
    ]
    return Table("The plan", head, rows)


def warehouses_table(found: Sequence[WarehouseAttention]) -> Table:
    """Return what the cells of each warehouse are used for."""
    head = ("warehouse", "cells", "in use", "dead", "effective", "negative α", "difference between samples")
    rows = [
        (
            one.name,
            f"{one.summary.mean.shape[1]:,}",
            f"{one.summary.mean.shape[1] - one.summary.dead_cells:,}",
            f"{one.summary.dead_cells:,}",
            _figure(one.summary.effective_cells, "{:.1f}"),
            _figure(one.summary.negative_share, "{:.1%}"),
            _figure(1 - one.summary.similarity, "{:.3f}"),
        )
        for one in found
    ]
    return Table("Cells by warehouse", head, rows)


def layers_table(found: Sequence[WarehouseAttention], record: RunRecord | None = None) -> Table:
    """Return the attention of each layer, with its multiply-adds and its share of time where these are known."""
    shares = _time_shares(record.bench) if record is not None else {}
    plan = record.plan if record is not None else None
    macs = {
        layer.name: layer.macs.kw
        for warehouse in (plan.warehouses if plan is not None else ())
        for layer in warehouse.layers
        if layer.macs is not None
    }
    head = ["layer", "warehouse", "kernel", "mixtures", "cells used", "negative α", "difference between samples"]
    head += ["multiply-adds"] * bool(macs) + ["share of time"] * bool(shares)
    rows = []
    for warehouse in found:
        for layer in warehouse.layers:
            row = [
                layer.name,
                warehouse.name,
                times(layer.share.kernel_shape),
                f"{layer.share.mixtures:,}",
                f"{layer.used_cells:,} of {layer.share.cells:,}",
                f"{layer.negative_share:.1%}",
                _figure(layer.variation, "{:.3f}"),
            ]
            row += [f"{macs[layer.name]:,}" if layer.name in macs else ""] * bool(macs)
            row += [f"{shares[layer.name]:.1%}" if layer.name in shares else ""] * bool(shares)
            rows.append(row)
    return Table("Layers", head, rows, left=3)


def measured_parts(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of `result.json` by part of the data: of validation those of the best checkpoint."""
    return {part: _numbers(metrics) for part, _, metrics in reversed([*_measured(result)])}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): value for key, value in metrics.items() if _is_number(value)}


def _measured(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield part of the data, checkpoint and metrics, the best of validation only, of `result.json`."""
    for part in ("test", "val"):
        checkpoints = result.get(part)
        if not isinstance(checkpoints, Mapping):
            continue
        for name, metrics in checkpoints.items():
            if isinstance(metrics, Mapping) and (name != "last" or "best" not in checkpoints or part == "test"):
                yield part, str(name), metrics


def _beside(label: str, own: int, static: int) -> Tile:
    return Tile(label, f"{own:,}", f"{own / max(static, 1):.2f} × the static network's {static:,}")


def _chart_of(key: str) -> str | None:
    name = key.lower()
    if "loss" in name:
        return "Loss"
    if name.startswith(("lr-", "lr_", "lr/")) or name in ("lr", "learning_rate"):
        return "Learning rate"
    if name.endswith("temperature"):
        return "Temperature"
    last = name.replace("_", "/").rpartition("/")[2]
    return "Accuracy" if last in ("accuracy", "acc", "top1", "top5", "map", "f1", "exact") else None


def _epochs(record: RunRecord) -> Table | None:
    """Return the last values of each epoch."""
    by_epoch: dict[int, dict[str, float]] = {}
    for row in record.metrics:
        if _is_number(row.get("epoch")):
            by_epoch.setdefault(int(row["epoch"]), {}).update(row)
    names = sorted({key for row in by_epoch.values() for key in row if _chart_of(key) and not key.startswith("test")})
    if not names or not by_epoch:
        return None
    rows = [
        (str(epoch + 1), *(f"{row[name]:.4g}" if name in row else "" for name in names))
        for epoch, row in sorted(by_epoch.items())
    ]
    return Table("The epochs as a table", ("epoch", *names), rows, folded=True)


def _classes(classes: Sequence[ClassMetrics]) -> Table:
    measured = [key for key in ("recall", "precision", "average_precision") if key in classes[0]]
    shown = classes if len(classes) <= SHOWN_CLASSES else worst(classes, SHOWN_CLASSES)
    title = "Accuracy by class" if len(shown) == len(classes) else f"The {len(shown)} worst of {len(classes):,} classes"
    rows = [
        (
            str(entry.get("name", "")),
            f"{entry.get('images', 0):,}",
            *(f"{entry[key]:.1%}" if _is_number(entry.get(key)) else "–" for key in measured),
        )
        for entry in shown
    ]
    return Table(title, ("class", "images", *(key.replace("_", " ") for key in measured)), rows)


def _confusions(confusion: Array, names: Sequence[str]) -> Table:
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(wrong, axis=None)[::-1][:SHOWN_CONFUSIONS]
    rows = []
    for truth, said in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[truth, said]:
            share = wrong[truth, said] / confusion[truth].sum()
            rows.append((names[truth], names[said], f"{wrong[truth, said]:,}", f"{share:.1%}"))
    return Table("Taken for another most often", ("class", "taken for", "images", "of its class"), rows, left=2)


def _answer(answer: Answer, names: Sequence[str], normalisation: Normalisation) -> Picture:
    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    truth = ", ".join(map(name, answer.truth)) or "no class"
    said = ", ".join(f"{name(number)} {score:.0%}" for number, score in answer.said) or "no class"
    source = data_address(answer.image, normalisation)
    detail = f"loss {answer.loss:.3g}" + (f", {answer.file}" if answer.file else "")
    return Picture(
        source, f"An image of {truth}", f"{truth}, told as {said}", detail, "right" if answer.right else "wrong"
    )


def _time_shares(bench: Mapping[str, Any] | None) -> dict[str, float]:
    """Return each layer's share of the dynamic layers' time in training, by what `kw bench --json` printed."""
    try:
        layers = (bench or {})["networks"][0]["layers"]
        seconds = {name: float(layer["seconds"]["kw"]) for layer in layers for name in layer["names"]}
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total > 0 else {}


def _figure(value: float | None, form: str) -> str:
    return form.format(value) if value is not None and math.isfinite(value) else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
