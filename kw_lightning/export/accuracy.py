"""What an export costs in accuracy: networks side by side on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy


@dataclass(frozen=True)
class Accuracy:
    """Shares of images that a network names right; of several labels an image, shares of its answers.

    Attributes:
        overall: of all images.
        classes: of each class's images; 0 where it has none.
    """

    overall: float
    classes: tuple[float, ...]


@torch.no_grad()
def compare(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    several: bool = False,
) -> dict[str, Accuracy]:
    """Return the accuracy of each network.

    Args:
        networks: by name, in evaluation mode.
        batches: images [batch, channels, height, width], preprocessed, and their classes [batch], or [batch, classes].
        classes: number of classes.
        several: whether an image may be of several classes.
    """
    accuracy = MultilabelAccuracy if several else MulticlassAccuracy
    overall = {name: accuracy(classes, average="micro") for name in networks}
    single = {name: accuracy(classes, average="none") for name in networks}
    for images, targets in batches:
        for name, network in networks.items():
            logits = network(images).float()
            answers = logits.sigmoid() if several else logits
            overall[name].update(answers, targets.long())
            single[name].update(answers, targets.long())
    return {name: Accuracy(float(overall[name].compute()), tuple(single[name].compute().tolist())) for name in networks}
