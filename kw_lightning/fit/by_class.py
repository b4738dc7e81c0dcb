"""How well each class is told from the others, counted by torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassStatScores, MultilabelAveragePrecision, MultilabelStatScores

ClassMetrics = Mapping[str, Any]
"""Of one class: `name`, `images` of it, `recall` and `precision` (0 to 1), and of several labels `average_precision`.

None stands where nothing can be said: the recall of a class without images, the precision of one that is never named.
"""


def class_counters(classes: int, *, several: bool = False) -> MetricCollection:
    """Return what counts answers class by class; it takes logits or classes, of several labels probabilities."""
    if not several:
        return MetricCollection({"counts": MulticlassStatScores(classes, average=None)})
    return MetricCollection(
        {
            "counts": MultilabelStatScores(classes, average=None),
            "average_precision": MultilabelAveragePrecision(classes, average=None),
        }
    )


def class_metrics(counters: MetricCollection, names: Sequence[str] = ()) -> list[ClassMetrics]:
    """Return the metrics of each class, in the order of the network's outputs.

    Args:
        counters: of `class_counters`, after the last image.
        names: of the classes; their numbers where there are none.
    """
    counted = counters.compute()
    precisions = counted.get("average_precision")
    found: list[ClassMetrics] = []
    for number, (hits, wrong, _, _, images) in enumerate(counted["counts"].tolist()):
        name = names[number] if number < len(names) else str(number)
        entry: dict[str, Any] = {
            "name": name,
            "images": images,
            "recall": hits / images if images else None,
            "precision": hits / (hits + wrong) if hits + wrong else None,
        }
        if precisions is not None:
            entry["average_precision"] = float(precisions[number]) if images else None
        found.append(entry)
    return found


def worst(classes: Sequence[ClassMetrics], count: int) -> list[ClassMetrics]:
    """Return the classes that are recognised worst, the worst first: by average precision, or by recall without it."""
    key = "average_precision" if classes and "average_precision" in classes[0] else "recall"
    return sorted((entry for entry in classes if entry[key] is not None), key=lambda entry: entry[key])[:count]
