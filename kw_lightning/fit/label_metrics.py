"""Metrics of images that may be of several classes at once."""

from __future__ import annotations

from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelExactMatch, MultilabelF1Score


def label_metrics(classes: int) -> MetricCollection:
    """Return torchmetrics' mean average precision, F1 score and share of images with every answer right.

    The first two are means over the classes; a class is said to be there from a probability of one half on.
    """
    return MetricCollection(
        {
            "map": MultilabelAveragePrecision(classes),
            "f1": MultilabelF1Score(classes),
            "exact": MultilabelExactMatch(classes),
        }
    )
