"""Keras's start values by Keras's names.

Keras starts kernels from glorot uniform and biases from 0, where PyTorch draws both from Kaiming uniform. Fans count
the receptive field; a kernel [out, in / groups, *size] has the same fans as Keras's [*size, in / groups, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import init

Initializer = Callable[[Tensor, int, int], object]
# A normal cut off at two standard deviations is narrower by this factor; Keras widens it to have the variance asked.
_TRUNCATION = 0.87962566103423978


def _uniform(variance: float, tensor: Tensor) -> object:
    bound = math.sqrt(3 * variance)
    return init.uniform_(tensor, -bound, bound)


def _truncated(deviation: float, tensor: Tensor) -> object:
    return init.trunc_normal_(tensor, 0, deviation, -2 * deviation, 2 * deviation)


def _scaled(variance: float, tensor: Tensor) -> object:
    return _truncated(math.sqrt(variance) / _TRUNCATION, tensor)


INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": lambda tensor, fan_in, fan_out: _uniform(2 / (fan_in + fan_out), tensor),
    "glorot_normal": lambda tensor, fan_in, fan_out: _scaled(2 / (fan_in + fan_out), tensor),
    "he_uniform": lambda tensor, fan_in, fan_out: _uniform(2 / fan_in, tensor),
    "he_normal": lambda tensor, fan_in, fan_out: _scaled(2 / fan_in, tensor),
    "lecun_uniform": lambda tensor, fan_in, fan_out: _uniform(1 / fan_in, tensor),
    "lecun_normal": lambda tensor, fan_in, fan_out: _scaled(1 / fan_in, tensor),
    "random_uniform": lambda tensor, fan_in, fan_out: init.uniform_(tensor, -0.05, 0.05),
    "random_normal": lambda tensor, fan_in, fan_out: init.normal_(tensor, 0, 0.05),
    "truncated_normal": lambda tensor, fan_in, fan_out: _truncated(0.05, tensor),
    "zeros": lambda tensor, fan_in, fan_out: init.zeros_(tensor),
    "ones": lambda tensor, fan_in, fan_out: init.ones_(tensor),
}


@torch.no_grad()
def initialize(tensor: Tensor | None, name: str, *, fan_in: int | None = None, fan_out: int | None = None) -> None:
    """Give a kernel or bias its start values.

    Args:
        tensor: [out, in, *size], or a vector; None is left alone.
        name: a key of `INITIALIZERS`.
        fan_in, fan_out: where they do not follow from the shape.
    """
    if tensor is None:
        return
    field = math.prod(tensor.shape[2:])
    if fan_in is None:
        fan_in = tensor.shape[1] * field if tensor.dim() > 1 else tensor.numel()
    if fan_out is None:
        fan_out = tensor.shape[0] * field if tensor.dim() > 1 else tensor.numel()
    INITIALIZERS[name](tensor, max(fan_in, 1), max(fan_out, 1))
