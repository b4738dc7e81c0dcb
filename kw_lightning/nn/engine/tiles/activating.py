"""An attention's batch norm and ReLU on a GPU, forward and backward in one launch each, in place of four and more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from kw_lightning.nn.engine.native import Activated
from kw_lightning.nn.engine.tiles import launches

ROWS, COLUMNS = 64, 16


def activates(means: Tensor) -> bool:
    """Return whether the functions here take the means of maps, [batch, channels]."""
    if means.device.type != launches.device_type() or means.dim() != 2 or means.dtype != torch.float32:
        return False
    return means.numel() > 0 and launches.missing() is None


def activate(
    means: Tensor,
    reduce: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    epsilon: float,
    *,
    given: bool,
) -> Activated:
    """Return the hidden activations: linear layer, batch norm, ReLU.

    Args:
        means: [batch, channels].
        reduce, bias: of the linear layer, [width, channels] and [width].
        scale, shift: of the norm, [width].
        running: the norm's mean and variance, [width], None where it keeps none.
        momentum: by which they take note of the batch.
        epsilon: of the norm.
        given: they are what is normalised by, and stay as they are.
    """
    raw = F.linear(means, reduce, bias)
    batch, width = raw.shape
    hidden = torch.empty_like(raw)
    if given and running is not None:
        mean, variance = running
    else:
        mean, variance = raw.new_empty(2, width).unbind()
    kept = (mean, variance) if running is None else running
    sizes = batch, width, epsilon, momentum, batch / max(batch - 1, 1)
    launches.start(
        "normalise",
        -(-width // COLUMNS),
        raw,
        scale,
        shift,
        mean,
        variance,
        *kept,
        hidden,
        *sizes,
        GIVEN=given,
        RUNNING=running is not None and not given,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    if running is not None and not given:
        increment_version(running)
    return Activated(means, hidden, raw, mean, variance)


def differentiate_activations(
    gradient: Tensor,
    found: Activated,
    reduce: Tensor,
    scale: Tensor,
    epsilon: float,
    *,
    given: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (the means, reduce, bias, scale, shift) from that of the hidden activations.

    Args:
        gradient: [batch, width].
        found: what `activate` found.
        reduce, scale, epsilon, given: as there.
        needed: which of the first three gradients are; the others are None.
    """
    batch, width = gradient.shape
    of_raw = torch.empty_like(found.raw)
    of_scale, of_shift = scale.new_empty(2, width).unbind()
    launches.start(
        "differentiate_norm",
        -(-width // COLUMNS),
        gradient.contiguous(),
        found.raw,
        found.hidden,
        scale,
        found.mean,
        found.variance,
        of_raw,
        of_scale,
        of_shift,
        batch,
        width,
        epsilon,
        GIVEN=given,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    of_means = torch.mm(of_raw, reduce) if needed[0] else None
    of_reduce = torch.mm(of_raw.t(), found.pooled) if needed[1] else None
    return of_means, of_reduce, of_raw.sum(0) if needed[2] else None, of_scale, of_shift
