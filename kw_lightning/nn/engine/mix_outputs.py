"""Mix outputs: convolve the input with every cell, Z_j = E_j·x, and mix the results, y = Σ_i shift_i(Σ_j α_ij · Z_j).

The dual of mixing inputs: it wins on small maps where kernels have several output groups but fewer input groups, as
for the convolutions that widen a network. Z is made at every position of the input, so strides waste work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mix_inputs import put_product
from kw_lightning.nn.engine.taps import Taps, every, rows_of
from kw_lightning.nn.engine.workspace import sample_chunks, scratch


def forward(x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, y: Tensor) -> None:
    """Write the convolution of every sample with its own kernel.

    Args:
        x: [batch, *size, in_channels].
        attention: α [batch, positions, output groups, input groups, cells].
        cells: E [cells, co, ci].
        taps: one for each of α's positions.
        y: [batch, *output_size, out_channels], overwritten.
    """
    for samples in _chunks(x, cells):
        batch = samples.stop - samples.start
        total = None
        for in_group in range(attention.shape[3]):
            inputs = _inputs(x[samples], in_group, cells)
            convolved = _convolve(inputs, cells, batch)
            part = torch.bmm(_weights(attention[samples], in_group), convolved)  # [batch, mixtures, rows · co]
            total = part if total is None else total.add_(part)
        if total is not None:
            _place(total, attention, taps, y[samples])


def backward(gradient: Tensor, x: Tensor, attention: Tensor, cells: Tensor, taps: Taps, wanted: Gradients) -> None:
    """Write the gradients; the cells' outputs are made anew, chunk by chunk.

    Args:
        gradient: of the output, [batch, *output_size, out_channels].
        x, attention, cells, taps: as in `forward`.
        wanted: where the gradients go.
    """
    count, co, ci = cells.shape
    size = x.shape[1:-1]
    for samples in _chunks(x, cells):
        batch = samples.stop - samples.start
        sources = _sources(gradient[samples], attention, taps, size)  # [batch, positions · output groups, rows · co]
        for in_group in range(attention.shape[3]):
            inputs = _inputs(x[samples], in_group, cells)
            weights = _weights(attention[samples], in_group)
            if wanted.attention is not None:
                convolved = _convolve(inputs, cells, batch)
                place = wanted.attention[samples][:, :, :, in_group]
                place += torch.bmm(sources, convolved.mT).view(place.shape)
            if wanted.cells is None and wanted.x is None:
                continue
            convolved_gradient = scratch("convolved", [count, batch, sources.shape[2]], x)
            torch.bmm(weights.mT, sources, out=convolved_gradient.transpose(0, 1))
            convolved_gradient = convolved_gradient.view(count, -1, co)
            if wanted.cells is not None:
                first = samples.start == 0 and in_group == 0
                put_product(wanted.cells, convolved_gradient.mT, inputs, first=first)
            if wanted.x is not None:
                target = rows_of(wanted.x[samples]).flatten(0, 1)[:, in_group * ci : (in_group + 1) * ci]
                torch.mm(convolved_gradient[0], cells[0], out=target)
                for rows, cell in zip(convolved_gradient[1:], cells[1:], strict=True):
                    target.addmm_(rows, cell)


def _chunks(x: Tensor, cells: Tensor) -> list[slice]:
    """Cut the batch so that the cells' outputs keep within the workspace."""
    sample = len(cells) * math.prod(x.shape[1:-1]) * cells.shape[1] * x.element_size()
    return sample_chunks(len(x), sample, x.device)


def _weights(attention: Tensor, in_group: int) -> Tensor:
    """Return α of one input group, [batch, positions · output groups, cells]."""
    return attention[:, :, :, in_group].flatten(1, 2)


def _inputs(x: Tensor, in_group: int, cells: Tensor) -> Tensor:
    """Return one input group [batch · rows, ci], the same for every cell, as [cells, batch · rows, ci]."""
    count, _, ci = cells.shape
    rows = x[..., in_group * ci : (in_group + 1) * ci].reshape(-1, ci)
    return rows.expand(count, *rows.shape)


def _convolve(inputs: Tensor, cells: Tensor, batch: int) -> Tensor:
    """Return the outputs of all cells, [batch, cells, rows · co]."""
    out = scratch("convolved", [len(cells), inputs.shape[1], cells.shape[1]], inputs)
    torch.bmm(inputs, cells.mT, out=out)
    return out.view(len(cells), batch, -1).transpose(0, 1)


def _place(mixed: Tensor, attention: Tensor, taps: Taps, y: Tensor) -> None:
    """Write y from what every position's mixtures give at the input's positions, [batch, mixtures, rows · co]."""
    _, positions, out_groups = attention.shape[:3]
    mixed = mixed.view(len(y), positions, out_groups, *taps.size, -1)
    if not taps.pointwise:
        y.zero_()
    for position, tap in enumerate(taps.taps):
        for out_group, place in enumerate(y.split(mixed.shape[-1], dim=-1)):
            if taps.pointwise:
                place.copy_(mixed[:, position, out_group])
            else:
                place[every(*tap.target)] += mixed[every(position, out_group, *tap.source)]


def _sources(gradient: Tensor, attention: Tensor, taps: Taps, size: torch.Size) -> Tensor:
    """Return the gradient of `mixed` in `_place`, zero at positions that no output reads."""
    _, positions, out_groups = attention.shape[:3]
    co = gradient.shape[-1] // out_groups
    if taps.pointwise and out_groups == 1:
        return gradient.reshape(len(gradient), 1, -1)
    out = gradient.new_zeros(len(gradient), positions, out_groups, *size, co)
    for position, tap in enumerate(taps.taps):
        for out_group, part in enumerate(gradient.split(co, dim=-1)):
            out[every(position, out_group, *tap.source)] = part[every(*tap.target)]
    return out.view(len(gradient), positions * out_groups, -1)
