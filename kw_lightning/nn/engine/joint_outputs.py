"""Mix outputs as `mix_outputs` does, but for all cells in single products: few launches, as a GPU wants it.

What all cells give at a position stands side by side, Z [rows, cells · co] = x·Eᵀ, one product with E as it lies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mix_inputs import put_product
from kw_lightning.nn.engine.taps import Taps, every, rows_of
from kw_lightning.nn.engine.workspace import sample_chunks


def forward(x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, y: Tensor) -> None:
    """Write the convolution of every sample with its own kernel; arguments as of `mix_outputs.forward`."""
    for samples in _chunks(x, cells):
        parts = [
            torch.matmul(_weights(attention[samples], in_group), _convolve(inputs, cells))
            for in_group, inputs in enumerate(rows_of(x[samples]).split(cells.shape[2], dim=-1))
        ]
        mixed = parts[0]
        for part in parts[1:]:
            mixed += part
        mixed = mixed.view(len(mixed), *taps.size, len(taps.taps), y.shape[-1])
        target = y[samples].zero_()
        for position, tap in enumerate(taps.taps):
            target[every(*tap.target)] += mixed[every(*tap.source)].select(-2, position)


def backward(gradient: Tensor, x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, wanted: Gradients) -> None:
    """Write the gradients; the cells' outputs are made anew, chunk by chunk. Arguments as of `mix_outputs.backward`."""
    flat = cells.flatten(0, 1)
    for samples in _chunks(x, cells):
        sources = _sources(gradient[samples], attention, taps)
        for in_group, inputs in enumerate(rows_of(x[samples]).split(cells.shape[2], dim=-1)):
            weights = _weights(attention[samples], in_group)
            if wanted.attention is not None:
                place = wanted.attention[samples][:, :, :, in_group]
                products = torch.matmul(sources, _convolve(inputs, cells).mT)
                place += products.sum(1, dtype=place.dtype).view(place.shape)
            if wanted.cells is None and wanted.x is None:
                continue
            convolved_gradient = torch.matmul(weights.mT, sources).flatten(2)  # [batch, rows, cells · co]
            if wanted.cells is not None:
                a, b = convolved_gradient.flatten(0, 1).t().unsqueeze(0), inputs.flatten(0, 1).unsqueeze(0)
                put_product(wanted.cells.view(1, *flat.shape), a, b, first=samples.start == 0 and in_group == 0)
            if wanted.x is not None:
                place = rows_of(wanted.x[samples]).split(cells.shape[2], dim=-1)[in_group]
                place.copy_(convolved_gradient @ flat)


def _chunks(x: Tensor, cells: Tensor) -> list[slice]:
    """Cut the batch so that the cells' outputs keep within the workspace."""
    sample = len(cells) * math.prod(x.shape[1:-1]) * cells.shape[1] * x.element_size()
    return sample_chunks(len(x), sample, x.device)


def _weights(attention: Tensor, in_group: int) -> Tensor:
    """Return α of one input group, [batch, 1, positions · output groups, cells]."""
    return attention[:, :, :, in_group].flatten(1, 2).unsqueeze(1)


def _convolve(inputs: Tensor, cells: Tensor) -> Tensor:
    """Return the outputs of all cells, [batch, rows, cells, co]."""
    return (inputs @ cells.flatten(0, 1).t()).unflatten(-1, cells.shape[:2])


def _sources(gradient: Tensor, attention: Tensor, taps: Taps) -> Tensor:
    """Return the gradient of `mixed` in `forward`, zero at positions that no output reads.

    Returns:
        [batch, rows, positions · output groups, co].
    """
    _, positions, out_groups = attention.shape[:3]
    out = gradient.new_zeros(len(gradient), *taps.size, positions, gradient.shape[-1])
    for position, tap in enumerate(taps.taps):
        out.select(-2, position)[every(*tap.source)] = gradient[every(*tap.target)]
    return out.view(len(gradient), math.prod(taps.size), positions * out_groups, -1)
