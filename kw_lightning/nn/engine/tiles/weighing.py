"""Weighing cells on a GPU: α of what the attention's last layer gives, and back, in one launch instead of ten."""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.tiles import launches

MOST_COLUMNS = 8192


def weighs(hidden: Tensor, columns: int) -> bool:
    """Return whether the functions here take z of hidden activations, with so many columns of a mixture."""
    fits = hidden.dtype == torch.float32 and hidden.device.type == launches.device_type() and columns <= MOST_COLUMNS
    return fits and hidden.numel() > 0 and launches.missing() is None


def weigh(
    z: Tensor, bias: Tensor, initial: Tensor, temperature: Tensor, dtype: torch.dtype, multiple: int = 1
) -> Tensor:
    """Return α [batch, mixtures, cells], zeros after the last of them up to a multiple.

    Args:
        z: [batch, mixtures, cells + 1], contiguous, without the bias.
        bias: c, [mixtures · (cells + 1)], contiguous.
        initial: β, [mixtures]: the cell that a mixture starts as, the number of cells for none.
        temperature: τ, a scalar of z's type.
        dtype: of α.
        multiple: of cells, a divisor of 32.
    """
    batch, mixtures, columns = z.shape
    length = columns - 1 + -(columns - 1) % multiple
    alpha = z.new_empty(batch, mixtures, length, dtype=dtype)
    block, warps = _cut(columns)
    launches.start(
        "weigh",
        batch * mixtures,
        z,
        bias,
        initial,
        temperature,
        alpha,
        length,
        mixtures,
        columns - 1,
        COLUMNS=block,
        num_warps=warps,
    )
    return alpha


def differentiate_weights(z: Tensor, bias: Tensor, gradient: Tensor, temperature: Tensor) -> None:
    """Put its gradient in the place of z.

    Args:
        z, bias, temperature: as in `weigh`.
        gradient: of α, [batch, mixtures, cells].
    """
    batch, mixtures, columns = z.shape
    if gradient.stride(2) != 1 or gradient.stride(0) != mixtures * gradient.stride(1):
        gradient = gradient.contiguous()
    block, warps = _cut(columns)
    launches.start(
        "differentiate_weights",
        batch * mixtures,
        z,
        bias,
        gradient,
        temperature,
        gradient.stride(1),
        mixtures,
        columns - 1,
        COLUMNS=block,
        num_warps=warps,
    )


def _cut(columns: int) -> tuple[int, int]:
    """Return the columns of a program, a power of 2, and the warps for them."""
    block = max(32, 1 << (columns - 1).bit_length())
    return block, min(max(block // 256, 1), 8)
