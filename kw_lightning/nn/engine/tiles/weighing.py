"""Weighing cells on a GPU: α of what the attention's last layer gives, and back, in one launch instead of ten."""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.tiles import launches

MOST_COLUMNS = 8192


def weighs(z: Tensor) -> bool:
    """Return whether the functions here take z."""
    device = "cpu" if launches.interpreted() else "cuda"
    fits = z.dtype == torch.float32 and z.device.type == device and z.shape[-1] <= MOST_COLUMNS
    return fits and z.numel() > 0 and launches.missing() is None


def weigh(z: Tensor, initial: Tensor, temperature: Tensor) -> Tensor:
    """Return α [batch, mixtures, cells].

    Args:
        z: [batch, mixtures, cells + 1], contiguous.
        initial: β, [mixtures]: the cell that a mixture starts as, the number of cells for none.
        temperature: τ, a scalar of z's type.
    """
    batch, mixtures, columns = z.shape
    alpha = z.new_empty(batch, mixtures, columns - 1)
    block, warps = _cut(columns)
    launches.kernels().weigh[(batch * mixtures,)](
        z, initial, temperature, alpha, mixtures, columns - 1, COLUMNS=block, num_warps=warps
    )
    return alpha


def differentiate_weights(z: Tensor, gradient: Tensor, temperature: Tensor) -> None:
    """Put its gradient in the place of z.

    Args:
        z, temperature: as in `weigh`.
        gradient: of α, [batch, mixtures, cells].
    """
    batch, mixtures, columns = z.shape
    if gradient.stride(2) != 1 or gradient.stride(0) != mixtures * gradient.stride(1):
        gradient = gradient.contiguous()
    block, warps = _cut(columns)
    launches.kernels().differentiate_weights[(batch * mixtures,)](
        z, gradient, temperature, gradient.stride(1), columns - 1, COLUMNS=block, num_warps=warps
    )


def _cut(columns: int) -> tuple[int, int]:
    """Return the columns of a program, a power of 2, and the warps for them."""
    block = max(32, 1 << (columns - 1).bit_length())
    return block, min(max(block // 256, 1), 8)
