"""Mix inputs as `mix_inputs` does, but for all cells in single products: few launches, as a GPU wants it.

The mixed inputs of a position stand side by side, U [rows, cells · ci], so that y = U·Eᵀ is one product over all cells.
For it, E is copied once to [co, cells · ci].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mix_inputs import put_product
from kw_lightning.nn.engine.taps import Taps, rows_of
from kw_lightning.nn.engine.workspace import sample_chunks


def forward(x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, y: Tensor) -> None:
    """Write the convolution of every sample with its own kernel; arguments as of `mix_inputs.forward`."""
    joined = _join(cells)
    for samples in _chunks(x, cells, taps):
        reads = _read(x[samples], attention.shape[3], taps)
        for out_group, target in enumerate(rows_of(y[samples]).split(cells.shape[1], dim=-1)):
            mixed = torch.matmul(_weights(attention[samples], out_group).mT, reads)
            target.copy_(mixed.flatten(2) @ joined.t())


def backward(gradient: Tensor, x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, wanted: Gradients) -> None:
    """Write the gradients; the mixed inputs are made anew, chunk by chunk. Arguments as of `mix_inputs.backward`."""
    count, co, ci = cells.shape
    joined = _join(cells)
    total = None if wanted.cells is None else wanted.cells.new_empty(1, *joined.shape)
    for samples in _chunks(x, cells, taps):
        reads = _read(x[samples], attention.shape[3], taps) if wanted.kernels else None
        reads_gradient = None
        for out_group, rows in enumerate(rows_of(gradient[samples]).split(co, dim=-1)):
            weights = _weights(attention[samples], out_group)
            if total is not None and reads is not None:
                mixed = torch.matmul(weights.mT, reads).flatten(0, 1).flatten(1)
                first = samples.start == 0 and out_group == 0
                put_product(total, rows.flatten(0, 1).t().unsqueeze(0), mixed.unsqueeze(0), first=first)
            if wanted.attention is None and wanted.x is None:
                continue
            mixed_gradient = (rows @ joined).unflatten(-1, (count, ci))
            if wanted.attention is not None and reads is not None:
                place = wanted.attention[samples][:, :, out_group]
                place += torch.matmul(reads, mixed_gradient.mT).sum(1, dtype=place.dtype).view(place.shape)
            if wanted.x is not None:
                part = torch.matmul(weights, mixed_gradient)
                reads_gradient = part if reads_gradient is None else reads_gradient.add_(part)
        if wanted.x is not None and reads_gradient is not None:
            _add_back(reads_gradient, attention.shape[3], taps, wanted.x[samples])
    if wanted.cells is not None and total is not None:
        wanted.cells.copy_(total[0].unflatten(1, (count, ci)).transpose(0, 1))


def _join(cells: Tensor) -> Tensor:
    """Return E as [co, cells · ci]."""
    return cells.transpose(0, 1).flatten(1)


def _chunks(x: Tensor, cells: Tensor, taps: Taps) -> list[slice]:
    """Cut the batch so that the mixed inputs keep within the workspace."""
    sample = len(cells) * math.prod(taps.output_size) * cells.shape[2] * x.element_size()
    return sample_chunks(len(x), sample, x.device)


def _weights(attention: Tensor, out_group: int) -> Tensor:
    """Return α of one output group, [batch, 1, positions · input groups, cells]."""
    return attention[:, :, out_group].flatten(1, 2).unsqueeze(1)


def _read(x: Tensor, in_groups: int, taps: Taps) -> Tensor:
    """Return what every mixture reads, [batch, rows, positions · input groups, ci]."""
    parts = x.unflatten(-1, (in_groups, -1))
    out = x.new_empty(len(x), *taps.output_size, len(taps.taps), *parts.shape[-2:])
    for position, tap in enumerate(taps.taps):
        taps.read(parts, tap, out.select(-3, position))
    return out.view(len(x), -1, len(taps.taps) * in_groups, parts.shape[-1])


def _add_back(gradient: Tensor, in_groups: int, taps: Taps, total: Tensor) -> None:
    """Write the gradient of the input from that of what the mixtures read: `_read` backwards."""
    parts = gradient.view(len(total), *taps.output_size, len(taps.taps), in_groups, -1)
    total.zero_()
    for position, tap in enumerate(taps.taps):
        taps.add_back(parts.select(-3, position), tap, total.unflatten(-1, (in_groups, -1)))
