"""What training makes small, by the recipe's `train.loss`: torch's and torchvision's own functions.

`bce` and `focal` take every class as a question of its own, to be answered with yes or no. Their targets are shares of
the classes: 1 of an image's class and 0 of the others, or what mixup and label smoothing make of them.

Notation:
    - b: images in the batch, k: classes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from kw_lightning.recipe.types import Loss, Train

NO_ALPHA = -1.0
"""What torchvision takes for a focal loss whose two answers weigh the same."""


def training_loss(
    logits: Tensor, targets: Tensor, train: Train, weights: Tensor | None = None, *, several: bool = False
) -> Tensor:
    """Return the loss of a batch: the mean over its images and, of `bce` and `focal`, over the classes.

    Cross entropy is torch's weighted mean, divided by the weights of the batch's classes; in the others a class's
    weight is that of its yes (torch's `pos_weight`).

    Args:
        logits: of the network [b x k].
        targets: classes [b], or shares of classes [b x k] of several labels and after mixup.
        train: the recipe's loss and label smoothing.
        weights: of the classes [k].
        several: whether an image may be of several classes: label smoothing then moves each answer towards one half.
    """
    logits = _precise(logits)
    weights = weights if weights is None else weights.to(logits)
    if train.loss.name == "cross_entropy":
        targets = targets if targets.ndim == 1 else targets.to(logits.dtype)
        return functional.cross_entropy(logits, targets, weights, label_smoothing=train.label_smoothing)
    classes = logits.shape[1]
    even = 1 / 2 if several else 1 / classes
    smoothed = (1 - train.label_smoothing) * _shares(targets, classes) + train.label_smoothing * even
    return _of_answers(logits, smoothed, train.loss, weights).mean()


def measured_loss(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:  # [b]
    """Return the loss of each image of an evaluation, without label smoothing and weights of classes.

    Args:
        logits: of the network [b x k].
        targets: classes [b], or of several labels [b x k].
        loss: the recipe's.
    """
    if loss.name == "cross_entropy":
        return functional.cross_entropy(logits, targets, reduction="none")
    return _of_answers(logits, _shares(targets, logits.shape[1]), loss).mean(dim=1)


def _of_answers(logits: Tensor, shares: Tensor, loss: Loss, weights: Tensor | None = None) -> Tensor:  # [b x k]
    """Return the loss of each class's answer."""
    shares = shares.to(logits.dtype)
    if loss.name == "bce":
        return functional.binary_cross_entropy_with_logits(logits, shares, reduction="none", pos_weight=weights)
    alpha = NO_ALPHA if loss.alpha is None else loss.alpha
    losses: Tensor = sigmoid_focal_loss(logits, shares, alpha, loss.gamma)
    return losses if weights is None else losses * (1 + (weights - 1) * shares)


def _precise(logits: Tensor) -> Tensor:
    """Return logits in single precision at least; torchvision's loss would stay in half."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _shares(targets: Tensor, classes: int) -> Tensor:  # [b x k]
    """Return 1 for an image's class and 0 for the others; shares stay what they are."""
    return functional.one_hot(targets, classes).float() if targets.ndim == 1 else targets
