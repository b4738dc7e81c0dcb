"""Adding the gradient of maps' means to a gradient of the maps on a GPU, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.tiles import launches

BLOCK = 2048
"""Numbers of a program."""


def pools(x: Tensor) -> bool:
    """Return whether `add_to_positions` takes a tensor like x [batch, *size, channels]."""
    if x.device.type != launches.device_type() or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.is_contiguous() and x.numel() > 0 and launches.missing() is None


def add_to_positions(x: Tensor, gradient: Tensor, means: Tensor, limit: float) -> Tensor:
    """Return x, a gradient of maps, plus that which their means' gradient is of every position.

    Args:
        x: [batch, *size, channels], contiguous.
        gradient: of the means, [batch, channels] in single precision.
        means: [batch, channels]; where one is as large as the limit, it has no gradient.
        limit: infinite for none.

    Returns:
        As x.
    """
    y = torch.empty_like(x)
    sample, channels = x[0].numel(), x.shape[-1]
    programs = -(-sample // BLOCK)
    launches.start(
        "add_to_positions",
        len(x) * programs,
        x,
        gradient.contiguous(),
        means,
        y,
        sample,
        channels,
        programs,
        channels / sample,
        limit,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y
