"""Mix outputs as `by_cell` does, but for all cells in one product: few launches, which suits a GPU.

The outputs of all cells at a position are side by side, Z [rows, cells · co] = x·Eᵀ: one product with E, not copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mixing import put_product
from kw_lightning.nn.engine.paths.mix_outputs.order import MixOutputs
from kw_lightning.nn.engine.paths.rows import Rows, multiply_adds, row_sizes
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import Taps, every, rows_of


class OutputsAtOnce(MixOutputs):
    """All cells in one product."""

    name = "mix_outputs/at_once"
    fitted_gpu = Fitted(
        Units(0, 1.3e-15, 6.9e-13, 0, 0.00043),
        Units(0, 7.7e-16, 2.4e-12, 3.2e-06, 0.00041),
    )

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        return "on a CPU its copies cost more than a product for each cell" if problem.on_cpu else None

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        sizes, batch = row_sizes(problem), problem.batch
        mixing, products = multiply_adds(self, problem, sizes.inputs, sizes.outputs)
        convolved, chunks = self.count_convolved(problem, sizes)
        given = batch * sizes.inputs * sizes.live * problem.convolution.kernel_shape[0]
        weights = batch * sizes.inputs * problem.cells * sizes.live * sizes.out_groups
        cast = 2 * sizes.stored if problem.dtype.itemsize < 4 else 0
        moved = cast + chunks * sizes.stored + 2 * batch * (sizes.maps[0] + 2 * sizes.patches) + 4 * given
        moved += sizes.in_groups * 2 * (convolved + weights)
        return Load(mixing, products, moved, 3 + chunks * (4 * sizes.in_groups + sizes.live))

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, taps = form
        for samples in self.chunks(form):
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

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients; what was mixed is made anew, chunk by chunk."""
        x, attention, cells, taps = form
        flat = cells.flatten(0, 1)
        for samples in self.chunks(form):
            sources = _sources(gradient[samples], attention, taps)
            for in_group, inputs in enumerate(rows_of(x[samples]).split(cells.shape[2], dim=-1)):
                weights = _weights(attention[samples], in_group)
                if found.attention is not None:
                    place = found.attention[samples][:, :, :, in_group]
                    products = torch.matmul(sources, _convolve(inputs, cells).mT)
                    place += products.sum(1, dtype=place.dtype).view(place.shape)
                if found.cells is None and found.x is None:
                    continue
                convolved_gradient = torch.matmul(weights.mT, sources).flatten(2)  # [batch, rows, cells · co]
                if found.cells is not None:
                    a, b = convolved_gradient.flatten(0, 1).t().unsqueeze(0), inputs.flatten(0, 1).unsqueeze(0)
                    put_product(found.cells.view(1, *flat.shape), a, b, first=samples.start == 0 and in_group == 0)
                if found.x is not None:
                    place = rows_of(found.x[samples]).split(cells.shape[2], dim=-1)[in_group]
                    place.copy_(convolved_gradient @ flat)


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
