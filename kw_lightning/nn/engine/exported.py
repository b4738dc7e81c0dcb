"""The form for export: one batched matrix product over shifted copies of the input, for any batch and any size.

A grouped convolution has its number of groups, and so the batch, written into an exported graph. Here every kernel
position's copy of a channel is cut out by an ordinary convolution whose kernels are one-hot, the same for every channel
of every sample: batch and size stay free, every runtime knows the operators, and a large kernel makes no large graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.reference import join_mixtures

AT_ONCE = 9
"""Kernel positions that one convolution cuts out; more are cut out dimension by dimension, which is less work."""


def convolve(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> Tensor:
    """Convolve every sample with its own kernel.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].

    Returns:
        [batch, out_channels, *output size].
    """
    batch, groups, out_channels = x.shape[0], convolution.groups, convolution.kernel_shape[0]
    copies, size = _copies(x, convolution)
    length = math.prod(convolution.kernel_shape[1:])
    rows = _join(torch.matmul(attention, cells.flatten(1)), convolution)
    rows = rows.reshape(batch, groups, out_channels // groups, length)
    columns = copies.reshape(batch, groups, length, math.prod(size))
    return torch.matmul(rows, columns).reshape(batch, out_channels, *size)


def _join(mixed: Tensor, convolution: Convolution) -> Tensor:
    """Return mixtures [batch, mixtures, co · ci · Πck] as kernels, by permutations of few dimensions at a time.

    Runtimes for phones limit those: XNNPACK takes six.
    """
    (spatial, out_groups, in_groups), (cell_out, cell_in, *cell_size) = convolution.grid, convolution.cell_shape
    positions, inside = math.prod(spatial), math.prod(cell_size)
    if positions > 1 and inside > 1:
        return join_mixtures(mixed.unflatten(2, convolution.cell_shape), convolution)
    if positions > 1:
        mixed = mixed.reshape(-1, positions, out_groups * in_groups * cell_out * cell_in).transpose(1, 2)
    if in_groups > 1:
        inner = cell_in * positions * inside
        mixed = mixed.reshape(-1, in_groups, cell_out, inner).transpose(1, 2)
    return mixed


def _copies(x: Tensor, convolution: Convolution) -> tuple[Tensor, list[int]]:
    """Return what every kernel position reads, [batch · channels · positions, 1, *output size], and the output size."""
    kernel, dimensions = convolution.kernel_shape[2:], range(convolution.dimensions)
    function = (F.conv1d, F.conv2d, F.conv3d)[len(dimensions) - 1]
    count, size = x.shape[0] * x.shape[1], list(x.shape[2:])
    for taken in [dimensions] if math.prod(kernel) <= AT_ONCE else [[dimension] for dimension in dimensions]:
        sides, stride = _only(taken, kernel, 1), _only(taken, convolution.stride, 1)
        padding, dilation = _only(taken, convolution.padding, 0), _only(taken, convolution.dilation, 1)
        positions = math.prod(sides)
        if positions * math.prod(stride) == 1 and not any(padding):  # each position reads itself
            continue
        one_hot = torch.eye(positions, dtype=x.dtype, device=x.device).reshape(positions, 1, *sides)
        x = function(x.reshape(count, 1, *size), one_hot, None, stride, padding, dilation)
        count, size = count * positions, list(x.shape[2:])
    return x, size


def _only(taken: Sequence[int], numbers: Sequence[int], neutral: int) -> list[int]:
    """Return the numbers of the dimensions that are taken, and the neutral one for the others."""
    return [number if dimension in taken else neutral for dimension, number in enumerate(numbers)]
