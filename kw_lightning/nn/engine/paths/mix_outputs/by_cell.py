"""Mix outputs: convolve the input with every cell, Z_j = E_j·x, and mix the results, y = Σ_i shift_i(Σ_j α_ij · Z_j).

The dual of mixing inputs: it wins on small maps where kernels have several output groups but fewer input groups, as
for the convolutions that widen a network. Z is made at every position of the input, so strides waste work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.costs import Fitted, Load, Units, narrow
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mixing import put_product
from kw_lightning.nn.engine.paths.mix_outputs.order import MixOutputs
from kw_lightning.nn.engine.paths.rows import Rows, multiply_adds, row_sizes
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import Taps, every, rows_of
from kw_lightning.nn.engine.workspace import scratch


class OutputsByCell(MixOutputs):
    """A product for each cell."""

    name = "mix_outputs/by_cell"
    fitted = Fitted(Units(3e-11, 4.7e-11, 0, 2e-05, 0.00074), Units(7e-11, 7.4e-11, 0, 0.00011, 0.00099))

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        return None if problem.on_cpu else "a GPU waits for the launch of a product for each cell"

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        sizes = row_sizes(problem)
        mixing, products = multiply_adds(self, problem, sizes.inputs, sizes.outputs)
        convolved, chunks = self.count_convolved(problem, sizes)
        places = problem.batch * (sum(sizes.maps) + sizes.patches) * sizes.live
        calls = chunks * (sizes.in_groups * problem.cells + sizes.live)
        slower = 1.0, narrow(problem.batch * sizes.inputs, sizes.ci, sizes.co)
        return Load(mixing, products, places + convolved * sizes.in_groups, calls, slower)

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, taps = form
        for samples in self.chunks(form):
            batch = samples.stop - samples.start
            total = None
            for in_group in range(attention.shape[3]):
                inputs = _inputs(x[samples], in_group, cells)
                convolved = _convolve(inputs, cells, batch)
                part = torch.bmm(_weights(attention[samples], in_group), convolved)  # [batch, mixtures, rows · co]
                total = part if total is None else total.add_(part)
            if total is not None:
                _place(total, attention, taps, y[samples])

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients; what was mixed is made anew, chunk by chunk."""
        x, attention, cells, taps = form
        count, co, ci = cells.shape
        size = x.shape[1:-1]
        for samples in self.chunks(form):
            batch = samples.stop - samples.start
            sources = _sources(gradient[samples], attention, taps, size)
            for in_group in range(attention.shape[3]):
                inputs = _inputs(x[samples], in_group, cells)
                weights = _weights(attention[samples], in_group)
                if found.attention is not None:
                    convolved = _convolve(inputs, cells, batch)
                    place = found.attention[samples][:, :, :, in_group]
                    place += torch.bmm(sources, convolved.mT).view(place.shape)
                if found.cells is None and found.x is None:
                    continue
                convolved_gradient = scratch("convolved", [count, batch, sources.shape[2]], x)
                torch.bmm(weights.mT, sources, out=convolved_gradient.transpose(0, 1))
                convolved_gradient = convolved_gradient.view(count, -1, co)
                if found.cells is not None:
                    first = samples.start == 0 and in_group == 0
                    put_product(found.cells, convolved_gradient.mT, inputs, first=first)
                if found.x is not None:
                    target = rows_of(found.x[samples]).flatten(0, 1)[:, in_group * ci : (in_group + 1) * ci]
                    torch.mm(convolved_gradient[0], cells[0], out=target)
                    for rows, cell in zip(convolved_gradient[1:], cells[1:], strict=True):
                        target.addmm_(rows, cell)


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
    """Return the gradient of `mixed` in `_place`, zero at positions that no output reads.

    Returns:
        [batch, positions · output groups, rows · co].
    """
    _, positions, out_groups = attention.shape[:3]
    co = gradient.shape[-1] // out_groups
    if taps.pointwise and out_groups == 1:
        return gradient.reshape(len(gradient), 1, -1)
    out = gradient.new_zeros(len(gradient), positions, out_groups, *size, co)
    for position, tap in enumerate(taps.taps):
        for out_group, part in enumerate(gradient.split(co, dim=-1)):
            out[every(position, out_group, *tap.source)] = part[every(*tap.target)]
    return out.view(len(gradient), positions * out_groups, -1)
