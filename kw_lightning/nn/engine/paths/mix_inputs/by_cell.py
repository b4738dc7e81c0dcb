"""Mix inputs: U_j = Σ_i α_ij · (what mixture i reads), then one dense product over all cells, y = Σ_j E_j·U_j.

No kernel of a single sample is ever made: n products a position instead of m, and none for mixing. It wins on small
maps, where n · positions < m · (positions + n), and all samples share the large products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw_lightning.nn.engine.costs import Fitted, Load, Units, narrow
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.mixing import put_product
from kw_lightning.nn.engine.paths.mix_inputs.compiled import InputsCompiled
from kw_lightning.nn.engine.paths.mix_inputs.order import MixInputs
from kw_lightning.nn.engine.paths.rows import Rows, multiply_adds, row_sizes
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import Taps, rows_of
from kw_lightning.nn.engine.workspace import scratch


class InputsByCell(MixInputs):
    """A product for each cell."""

    name = "mix_inputs/by_cell"
    fitted = Fitted(Units(0, 4.3e-11, 0, 1.9e-05, 0.0011), Units(2.4e-10, 7.4e-11, 0, 0, 0.0022))

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        if not problem.on_cpu:
            return "a GPU waits for the launch of a product for each cell"
        if problem.dtype == torch.float32 and InputsCompiled().refusal(problem) is None:
            return "a compiled pass does the same in the cache"
        return None

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        sizes = row_sizes(problem)
        mixing, products = multiply_adds(self, problem, sizes.inputs, sizes.outputs)
        mixed, chunks = self.count_mixed(problem, sizes)
        reads = problem.batch * (sum(sizes.maps) + sizes.patches) * sizes.live
        calls = chunks * (sizes.out_groups * problem.cells + sizes.live)
        slower = 1.0, narrow(sizes.ci, sizes.co)
        return Load(mixing, products, reads + mixed * sizes.out_groups, calls, slower)

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, attention, cells, taps = form
        for samples in self.chunks(form):
            reads = _read(x[samples], attention, taps)
            out = rows_of(y[samples]).flatten(0, 1)
            for out_group, target in enumerate(out.split(cells.shape[1], dim=1)):
                mixed = _mix(reads, _weights(attention[samples], out_group), cells.shape[2])
                torch.mm(mixed[0], cells[0].t(), out=target)
                for inputs, cell in zip(mixed[1:], cells[1:], strict=True):
                    target.addmm_(inputs, cell.t())

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients; what was mixed is made anew, chunk by chunk."""
        x, attention, cells, taps = form
        count, co, ci = cells.shape
        for samples in self.chunks(form):
            batch = samples.stop - samples.start
            reads = _read(x[samples], attention, taps) if found.of_kernels else None
            parts: list[Tensor] = []
            for out_group in range(attention.shape[2]):
                weights = _weights(attention[samples], out_group)
                rows = rows_of(gradient[samples])[:, :, out_group * co : (out_group + 1) * co].reshape(-1, co)
                rows = rows.expand(count, *rows.shape)  # the same rows for every cell
                if found.cells is not None and reads is not None:
                    first = samples.start == 0 and out_group == 0
                    put_product(found.cells, rows.mT, _mix(reads, weights, ci), first=first)
                if found.attention is None and found.x is None:
                    continue
                mixed_gradient = scratch("mixed", [*rows.shape[:2], ci], x)
                torch.bmm(rows, cells, out=mixed_gradient)
                mixed_gradient = mixed_gradient.view(count, batch, -1).transpose(0, 1)  # [batch, cells, rows · ci]
                if found.attention is not None and reads is not None:
                    place = found.attention[samples][:, :, out_group]
                    place += torch.bmm(reads, mixed_gradient.mT).view(place.shape)
                if found.x is not None:
                    parts.append(torch.bmm(weights, mixed_gradient))
            if found.x is not None:
                _add_back(parts, attention, taps, found.x[samples])


def _weights(attention: Tensor, out_group: int) -> Tensor:
    """Return α of one output group, [batch, positions · input groups, cells]."""
    return attention[:, :, out_group].flatten(1, 2)


def _read(x: Tensor, attention: Tensor, taps: Taps) -> Tensor:
    """Return what every mixture reads, [batch, positions · input groups, rows · ci]."""
    in_groups = attention.shape[3]
    if taps.pointwise and in_groups == 1:
        return x.reshape(len(x), 1, -1)
    parts = x.split(x.shape[-1] // in_groups, dim=-1)
    out = scratch("reads", [len(x), len(taps.taps), in_groups, *taps.output_size, parts[0].shape[-1]], x)
    for position, tap in enumerate(taps.taps):
        for in_group, part in enumerate(parts):
            taps.read(part, tap, out[:, position, in_group])
    return out.view(len(x), len(taps.taps) * in_groups, -1)


def _mix(reads: Tensor, weights: Tensor, ci: int) -> Tensor:
    """Return the mixed inputs of every cell, [cells, batch · rows, ci]."""
    batch, _, columns = reads.shape
    mixed = scratch("mixed", [weights.shape[2], batch, columns], reads)
    torch.bmm(weights.mT, reads, out=mixed.transpose(0, 1))
    return mixed.view(len(mixed), -1, ci)


def _add_back(parts: list[Tensor], attention: Tensor, taps: Taps, total: Tensor) -> None:
    """Write the gradient of the input from that of what the mixtures read: `_read` backwards."""
    gradient = parts[0]
    for part in parts[1:]:
        gradient += part
    in_groups = attention.shape[3]
    gradient = gradient.view(len(total), len(taps.taps), in_groups, *taps.output_size, -1)
    if taps.pointwise and in_groups == 1:
        total.copy_(gradient[:, 0, 0])
        return
    total.zero_()
    for position, tap in enumerate(taps.taps):
        for in_group, place in enumerate(total.split(total.shape[-1] // in_groups, dim=-1)):
            taps.add_back(gradient[:, position, in_group], tap, place)
