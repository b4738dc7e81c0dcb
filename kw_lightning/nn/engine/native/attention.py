"""Calls of attention.c: from z to α and backwards, in single precision on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.native.library import library


def weighs(z: Tensor) -> bool:
    """Return whether the functions here take z."""
    return z.dtype == torch.float32 and z.device.type == "cpu" and library() is not None


def weigh(z: Tensor, initial: Tensor, temperature: Tensor) -> Tensor:
    """Return α [batch, mixtures, cells].

    Args:
        z: [batch, mixtures, cells + 1], contiguous.
        initial: β, [mixtures]: the cell that a mixture starts as, the number of cells for none.
        temperature: τ, a scalar of z's type.
    """
    loaded = library()
    assert loaded is not None
    batch, mixtures, columns = z.shape
    alpha = z.new_empty(batch, mixtures, columns - 1)
    size = batch, mixtures, columns - 1, torch.get_num_threads()
    loaded.kw_weigh(z.data_ptr(), initial.data_ptr(), temperature.data_ptr(), *size, alpha.data_ptr())
    return alpha


def differentiate_weights(z: Tensor, gradient: Tensor, temperature: Tensor) -> None:
    """Put its gradient in the place of z.

    Args:
        z, temperature: as in `weigh`.
        gradient: of α, [batch, mixtures, cells], contiguous.
    """
    loaded = library()
    assert loaded is not None
    batch, mixtures, columns = z.shape
    size = batch, mixtures, columns - 1, torch.get_num_threads()
    loaded.kw_differentiate_weights(z.data_ptr(), gradient.data_ptr(), temperature.data_ptr(), *size)
