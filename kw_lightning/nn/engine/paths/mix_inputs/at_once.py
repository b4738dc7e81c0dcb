"""Mix inputs as `by_cell` does, but for all cells in one product: few launches, which suits a GPU.

The mixed inputs of a position are side by side, U [rows, cells · ci], so that y = U·Eᵀ is one product over all cells.
For it, E is copied once to [co, cells · ci].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mixing import put_product
from kw_lightning.nn.engine.paths.mix_inputs.order import MixInputs
from kw_lightning.nn.engine.paths.rows import Rows, multiply_adds, row_sizes
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import Taps, rows_of


class InputsAtOnce(MixInputs):
    """All cells in one product."""

    name = "mix_inputs/at_once"
    fitted_gpu = Fitted(
        Units(5.1e-14, 4.4e-16, 1.1e-12, 4.5e-06, 0.0003),
        Units(1.5e-13, 3.8e-15, 1.9e-12, 7.1e-06, 0.00076),
    )

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        return "on a CPU its copies cost more than a product for each cell" if problem.on_cpu else None

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        sizes, batch = row_sizes(problem), problem.batch
        mixing, products = multiply_adds(self, problem, sizes.inputs, sizes.outputs)
        mixed, chunks = self.count_mixed(problem, sizes)
        x, y = sizes.maps
        reads = batch * sizes.outputs * sizes.live * sizes.in_groups * sizes.ci
        weights = batch * sizes.outputs * problem.cells * sizes.live * sizes.in_groups
        cast = 2 * sizes.stored if problem.dtype.itemsize < 4 else 0
        moved = cast + batch * (x + 2 * sizes.patches + 3 * y) + 3 * sizes.stored + 2 * reads
        moved += sizes.out_groups * 2 * (mixed + weights)
        return Load(mixing, products, moved, 4 + chunks * (4 * sizes.out_groups + sizes.live))

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, taps = form
        joined = _join(cells)
        for samples in self.chunks(form):
            reads = _read(x[samples], attention.shape[3], taps)
            for out_group, target in enumerate(rows_of(y[samples]).split(cells.shape[1], dim=-1)):
                mixed = torch.matmul(_weights(attention[samples], out_group).mT, reads)
                target.copy_(mixed.flatten(2) @ joined.t())

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients; what was mixed is made anew, chunk by chunk."""
        x, attention, cells, taps = form
        count, co, ci = cells.shape
        joined = _join(cells)
        total = None if found.cells is None else found.cells.new_empty(1, *joined.shape)
        for samples in self.chunks(form):
            reads = _read(x[samples], attention.shape[3], taps) if found.of_kernels else None
            reads_gradient = None
            for out_group, rows in enumerate(rows_of(gradient[samples]).split(co, dim=-1)):
                weights = _weights(attention[samples], out_group)
                if total is not None and reads is not None:
                    mixed = torch.matmul(weights.mT, reads).flatten(0, 1).flatten(1)
                    first = samples.start == 0 and out_group == 0
                    put_product(total, rows.flatten(0, 1).t().unsqueeze(0), mixed.unsqueeze(0), first=first)
                if found.attention is None and found.x is None:
                    continue
                mixed_gradient = (rows @ joined).unflatten(-1, (count, ci))
                if found.attention is not None and reads is not None:
                    place = found.attention[samples][:, :, out_group]
                    place += torch.matmul(reads, mixed_gradient.mT).sum(1, dtype=place.dtype).view(place.shape)
                if found.x is not None:
                    part = torch.matmul(weights, mixed_gradient)
                    reads_gradient = part if reads_gradient is None else reads_gradient.add_(part)
            if found.x is not None and reads_gradient is not None:
                _add_back(reads_gradient, attention.shape[3], taps, found.x[samples])
        if found.cells is not None and total is not None:
            found.cells.copy_(total[0].unflatten(1, (count, ci)).transpose(0, 1))


def _join(cells: Tensor) -> Tensor:
    """Return E as [co, cells · ci]."""
    return cells.transpose(0, 1).flatten(1)


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
