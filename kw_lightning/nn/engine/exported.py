"""The form for export: batched matrix products over shifted copies of the input, for any batch and any size.

A grouped convolution has its number of groups, and so the batch, written into an exported graph; here batch and size
stay free, and every runtime knows the operators.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.reference import assemble_kernels


def convolve(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> Tensor:
    """Convolve every sample with its own kernel.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].

    Returns:
        [batch, out_channels, *output size].
    """
    groups, out_channels = convolution.groups, convolution.kernel_shape[0]
    kernels = assemble_kernels(attention, cells, convolution)
    size = convolution.output_size(tuple(x.shape[2:]))
    x = F.pad(x, [side for padding in reversed(convolution.padding) for side in (padding, padding)])
    copies = torch.stack([_shifted(x, taps, size, convolution) for taps in _taps(convolution)], dim=2)
    # [batch, groups, in_channels / groups · taps, positions]
    columns = copies.flatten(3).unflatten(1, (groups, -1)).flatten(2, 3)
    rows = kernels.flatten(2).unflatten(1, (groups, -1)).flatten(3)
    y = torch.matmul(rows, columns)
    return y.reshape(x.shape[0], out_channels, *size)


def _taps(convolution: Convolution) -> list[tuple[int, ...]]:
    """Return the kernel's positions, in the order of its numbers."""
    return list(itertools.product(*map(range, convolution.kernel_shape[2:])))


def _shifted(x: Tensor, taps: tuple[int, ...], size: tuple[int, ...], convolution: Convolution) -> Tensor:
    """Return what one kernel position reads of the padded input [batch, in_channels, *output size]."""
    places = zip(taps, size, convolution.stride, convolution.dilation, strict=True)
    for dimension, (tap, length, stride, dilation) in enumerate(places, start=2):
        start = tap * dilation
        # A stop of start + stride·length would be right as well, and beyond the end: exporters want it inside.
        x = x.narrow(dimension, start, stride * (length - 1) + 1)
        if stride > 1:
            x = x[(slice(None),) * dimension + (slice(None, None, stride),)]
    return x
