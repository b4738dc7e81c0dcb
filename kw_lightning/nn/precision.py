"""In which type a layer computes: its weights' own, as torch's layers do, or that of autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast asks for on a device; None where it is off, or there is none (`meta`)."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type; a conversion to its own type is left out, which an exported graph would hold."""
    return x if x.dtype == dtype else x.to(dtype)


def compute_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type in which to compute.

    Raises:
        RuntimeError: x is of another type than the weight, and autocast does not turn both to its own.
    """
    autocast = autocast_type(x.device)
    if autocast is not None and x.is_floating_point():
        return autocast
    if x.dtype != weight.dtype:
        raise RuntimeError(f"input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    return x.dtype
