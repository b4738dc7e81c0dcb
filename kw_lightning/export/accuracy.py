"""What an export costs in accuracy: networks side by side on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


@dataclass(frozen=True)
class Accuracy:
    """Shares of images that a network names right.

    Attributes:
        overall: of all images.
        classes: of each class's images; 0 where it has none.
    """

    overall: float
    classes: tuple[float, ...]


@torch.no_grad()
def compare(
    networks: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> dict[str, Accuracy]:
    """Return the accuracy of each network.

    Args:
        networks: by name, in evaluation mode.
        batches: images [batch, channels, height, width], preprocessed, and their classes [batch].
        classes: number of classes.
    """
    overall = {name: MulticlassAccuracy(classes, average="micro") for name in networks}
    single = {name: MulticlassAccuracy(classes, average="none") for name in networks}
    for images, targets in batches:
        for name, network in networks.items():
            logits = network(images).float()
            overall[name].update(logits, targets)
            single[name].update(logits, targets)
    return {name: Accuracy(float(overall[name].compute()), tuple(single[name].compute().tolist())) for name in networks}
