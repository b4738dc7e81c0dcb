"""Weights in eight bits on their way to and from a file: a quarter of its size, and single precision again when read.

A matrix or cell is kept as whole numbers from −127 to 127 and one factor for each row: each cell of a warehouse, which
its layers share, each output of a layer. Vectors, as biases and norms, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTORS = ".int8_factors"
"""What a key of factors ends in, after the key of the numbers."""
LEAST = 256
"""Numbers of a tensor that is packed; of smaller ones the factors would weigh as much."""
LARGEST = 127


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the large ones in eight bits, each with its factors [rows] beside it."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() < LEAST:
            found[key] = tensor
            continue
        rows = tensor.flatten(1).float()
        factors = (rows.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        found[key] = (rows / factors.unsqueeze(1)).round().to(torch.int8).reshape(tensor.shape)
        found[f"{key}{FACTORS}"] = factors
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `packed` was given, rounded by at most half a factor; other tensors as they are."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        factors = tensors.get(f"{key}{FACTORS}")
        if key.endswith(FACTORS) and key.removesuffix(FACTORS) in tensors:
            continue
        if factors is not None and tensor.dtype == torch.int8 and factors.shape == tensor.shape[:1]:
            tensor = (tensor.flatten(1).float() * factors.unsqueeze(1)).reshape(tensor.shape)
        found[key] = tensor
    return found
