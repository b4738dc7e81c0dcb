"""A matrix as a picture, without a plotting library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 256, 1024  # pixels of the longer side


def heat_map(matrix: Tensor) -> Tensor:
    """Return a picture of a matrix: red above 0, white at 0, blue under 0, full colour at the largest magnitude.

    Small matrices get blocks of pixels, large ones are averaged down.

    Args:
        matrix: [rows, columns].

    Returns:
        [3, height, width], uint8.
    """
    values = matrix.detach().float().cpu()
    longest = max(values.shape)
    if longest > LARGEST:
        rows, columns = (max(round(side * LARGEST / longest), 1) for side in values.shape)
        values = F.adaptive_avg_pool2d(values[None], (rows, columns))[0]
    block = max(SMALLEST // max(values.shape), 1)
    values = values.repeat_interleave(block, dim=0).repeat_interleave(block, dim=1)
    values = values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    fade = 1 - values.abs()
    red, blue = torch.where(values > 0, 1, fade), torch.where(values < 0, 1, fade)
    return (torch.stack([red, fade, blue]) * 255).round().to(torch.uint8)
