"""Mix kernels, then convolve by one batched matrix product per phase image of the input, shifted and added up (kn2row).

A. Vasudevan, A. Anderson, D. Gregg, "Parallel Multi Channel Convolution using General Matrix Multiplication",
https://arxiv.org/abs/1704.04428, for kernels of a sample's own.

The mixtures of all kernel positions are the rows of one matrix, W [positions · output groups · co, ci], as they come
out of the mixing product: no kernel is ever permuted, only α, which is small. One product with it gives what every
input position contributes through every kernel position; adding those up, shifted, is the convolution. Backwards, the
output's gradient is shifted once, and both gradients are one product each. With stride s this is done on each of the
Πs interleaved phase images with the kernel positions that read it, so that no product is wasted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine import mixing
from kw_lightning.nn.engine.costs import Fitted, Load, Units, narrow
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.paths.mix_kernels.compiled import KernelsCompiled
from kw_lightning.nn.engine.paths.rows import Rows, RowsPath, multiply_adds, row_sizes
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import Tap, Taps, every, put, rows_of, take
from kw_lightning.nn.engine.workspace import kernel_chunks, scratch
from kw_lightning.nn.partition import Shape

# Input channels of a cell under which the cells of several input groups are joined, by a copy, to one wide operand.
JOINED_CHANNELS = 64

Operands = list[tuple[slice, Tensor]]  # (input channels, weights [batch, positions, output groups, rows, channels])


class Shifted(RowsPath):
    """One product for all kernel positions, whose parts are then shifted and added up."""

    name = "mix_kernels/shifted"
    fitted_gpu = Fitted(
        Units(0, 6.1e-15, 2.5e-13, 2e-05, 0.00018),
        Units(1.3e-14, 0, 2.4e-13, 3.1e-05, 0.00046),
    )
    fitted = Fitted(
        Units(5.2e-11, 3.8e-11, 3.7e-10, 0.00012, 0.00041), Units(1.4e-10, 7.2e-11, 8.6e-11, 0.00022, 0.00081)
    )

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest for a problem, None where it may be."""
        pointwise = math.prod(problem.convolution.kernel_shape[2:]) == 1 and problem.dtype == torch.float32
        if problem.backward and pointwise and KernelsCompiled().refusal(problem) is None:
            return "compiled passes copy no maps for kernels of one position, and compute both gradients at once"
        return None

    def takes_any_layout(self, taps: Taps) -> bool:
        """Return whether maps of any memory format will do: of one tap, which is no more than a product."""
        return len(taps.taps) == 1

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass; what every tap gives is written, read, and added to the output."""
        sizes, batch, itemsize = row_sizes(problem), problem.batch, problem.dtype.itemsize
        mixing, products = multiply_adds(self, problem, sizes.inputs, sizes.phase)
        mixtures = sizes.live * sizes.out_groups * sizes.in_groups
        given = 0 if sizes.live == 1 else batch * sizes.phase * sizes.live * problem.convolution.kernel_shape[0]
        row = max(sizes.ci, 0 if sizes.live == 1 else sizes.phase // sizes.in_groups)
        samples, rows = kernel_chunks(batch, mixtures, sizes.co, row * itemsize, problem.device)
        cut = len(samples) * len(rows)
        moved = batch * (sum(sizes.maps) + sizes.patches)
        if problem.on_cpu:
            width = sizes.in_groups * sizes.ci if sizes.ci < JOINED_CHANNELS else sizes.ci
            slower = narrow(batch / max(len(samples), 1) * mixtures), narrow(width, sizes.phase)
            return Load(mixing, products, moved + 2 * given, cut * (sizes.live + sizes.in_groups), slower)
        cast = 2 * sizes.stored if itemsize < 4 else 0
        kernels = batch * math.prod(problem.convolution.kernel_shape)
        moved += cast + len(samples) * sizes.stored + 4 * kernels + 4 * given + batch * sizes.patches
        return Load(mixing, products, moved, 4 + cut * (2 + sizes.in_groups + (sizes.live if given else 0)))

    def forward_rows(self, form: Rows, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        work = _Work(form)
        if not (work.direct and all(map(work.adjoining, work.rows))):
            y.zero_()
        for samples in work.samples:
            images = [phase.image(form.x[samples]) for phase in work.phases]
            for rows in work.rows:
                operands = _operands(work.mix(samples, rows))
                for phase, image in zip(work.phases, images, strict=True):
                    if work.direct and work.adjoining(rows):
                        _apply(image, phase.select(operands), rows_of(y[samples])[:, :, work.outputs(rows)])
                        continue
                    weights = phase.select(operands)
                    parts = scratch("parts", [*image.shape[:2], weights[0][1].shape[1]], image)
                    _apply(image, weights, parts)
                    phase.add_up(parts, work.grouped(y[samples], rows))

    def backward_rows(self, gradient: Tensor, form: Rows, found: Gradients) -> None:
        """Write the gradients; the kernels are mixed anew, chunk by chunk."""
        work = _Work(form)
        if found.x is not None and len(work.phases) < math.prod(form.taps.stride):
            found.x.zero_()  # positions that no tap reads
        for samples in work.samples:
            images = [phase.image(form.x[samples]) for phase in work.phases]
            if found.x is not None:
                totals = [phase.total(found.x[samples]) for phase in work.phases]
            spreads: list[Tensor] = []
            for rows in work.rows:
                if work.direct and work.adjoining(rows):
                    spreads = [rows_of(gradient[samples])[:, :, work.outputs(rows)]]
                else:
                    part = work.grouped(gradient[samples], rows)
                    spreads = [phase.spread(part, spreads[i : i + 1]) for i, phase in enumerate(work.phases)]
                if found.x is not None:
                    operands = _operands(work.mix(samples, rows))
                    for phase, spread, total in zip(work.phases, spreads, totals, strict=True):
                        for inputs, weights in phase.select(operands):
                            _multiply(spread, weights, total[:, :, inputs], first=rows.start == 0)
                if found.of_kernels:
                    kernels = work.kernels(samples, rows)
                    operands = _operands(kernels)
                    for phase, spread, image in zip(work.phases, spreads, images, strict=True):
                        for inputs, weights in phase.select(operands):
                            _multiply(spread.mT, image[:, :, inputs], weights, first=True)
                    _take_back(operands, kernels)
                    work.mixture_gradients(samples, rows, kernels, found)
            if found.x is not None:
                for phase, total in zip(work.phases, totals, strict=True):
                    phase.put_back(total, found.x[samples])
        work.finish(found)


@dataclass(frozen=True)
class _Phase:
    """One phase image of the input, and the taps that read it: adjoining kernel positions in `_Work`'s order.

    Attributes:
        phase: its offsets in the input.
        taps: that read it.
        first: position of the first of them.
        all: the taps of the convolution.
    """

    phase: Shape
    taps: tuple[Tap, ...]
    first: int
    all: Taps

    def image(self, x: Tensor) -> Tensor:
        """Return the phase image of x [batch, *size, channels] as [batch, positions, channels]."""
        return rows_of(x) if self._whole else rows_of(x[self._place].contiguous())

    def total(self, gradient: Tensor) -> Tensor:
        """Return memory for the gradient of the phase image: the input's own where it is the whole input."""
        if self._whole:
            return rows_of(gradient)
        return gradient.new_empty(gradient.shape[0], math.prod(self._size), gradient.shape[-1])

    def put_back(self, total: Tensor, gradient: Tensor) -> None:
        """Write the gradient of the phase image into that of the input."""
        if not self._whole:
            place = gradient[self._place]
            place.copy_(total.view(place.shape))

    def select(self, operands: Operands) -> Operands:
        """Return the operands of the phase's kernel positions as matrices [batch, positions · groups · rows, ci]."""
        last = self.first + len(self.taps)
        return [(inputs, weights[:, self.first : last].flatten(1, 3)) for inputs, weights in operands]

    def add_up(self, parts: Tensor, y: Tensor) -> None:
        """Add what the input's positions contribute through every tap.

        Args:
            parts: [batch, positions of the phase image, taps · output groups · rows].
            y: [batch, *output_size, output groups, rows], changed in place.
        """
        parts = parts.view(len(y), *self._size, len(self.taps), *y.shape[-2:])
        for index, tap in enumerate(self.taps):
            y[every(*tap.target)] += parts[every(*tap.shifted, index)]

    def spread(self, gradient: Tensor, before: list[Tensor]) -> Tensor:
        """Return the output's gradient as every tap brings it to the phase image: `add_up` backwards.

        Args:
            gradient: [batch, *output_size, output groups, rows].
            before: nothing, **or** what `spread` returned for other rows, to be written over: its zeros stay.

        Returns:
            [batch, positions of the phase image, taps · output groups · rows].
        """
        shape = (len(gradient), *self._size, len(self.taps), *gradient.shape[-2:])
        out = before[0].view(shape) if before else scratch(f"spread {self.phase}", shape, gradient).zero_()
        for index, tap in enumerate(self.taps):
            out[every(*tap.shifted, index)] = gradient[every(*tap.target)]
        return out.view(len(gradient), math.prod(self._size), -1)

    @property
    def _whole(self) -> bool:
        return math.prod(self.all.stride) == 1

    @property
    def _size(self) -> Shape:
        return self.all.phase_size(self.phase)

    @property
    def _place(self) -> tuple[slice | int, ...]:
        return every(*self.all.phase_slices(self.phase))


class _Work:
    """The buffer of per-sample kernels, and the mixing products that fill and read it.

    Within, kernel positions are sorted by the phase they read, and input groups come first: α is permuted so.

    Attributes:
        direct: one tap gives every output from one input position: the product is the output.
        phases: that some tap reads.
        samples, rows: the chunks of the batch and of the cells' rows.
        out_groups: cells along the kernel's output channels.
    """

    def __init__(self, form: Rows) -> None:
        x, attention, cells, taps = form
        self.cells = cells
        self.order = sorted(range(len(taps.taps)), key=lambda index: taps.taps[index].phase)
        self.phases: list[_Phase] = []
        for first, index in enumerate(self.order):
            phase = taps.taps[index].phase
            if not self.phases or self.phases[-1].phase != phase:
                members = tuple(tap for tap in taps.taps if tap.phase == phase)
                self.phases.append(_Phase(phase, members, first, taps))
        tap = taps.taps[0]
        self.direct = len(taps.taps) == 1 and tap.whole and taps.phase_size(tap.phase) == taps.output_size
        self.attention = take(attention, self.order).permute(0, 3, 1, 2, 4).contiguous()
        self.gradient: Tensor | None = None
        self.out_groups = attention.shape[2]
        mixtures = math.prod(attention.shape[1:4])
        _, co, ci = cells.shape
        # What a sample's row takes: its kernel, and what the input gives through every tap before it is added up.
        row = ci if self.direct else max(ci, math.prod(taps.phase_size(tap.phase)) // attention.shape[3])
        self.samples, self.rows = kernel_chunks(len(x), mixtures, co, row * x.element_size(), x.device)
        most = (self.samples[0].stop - self.samples[0].start) * (self.rows[0].stop - self.rows[0].start)
        self.buffer = scratch("kernels", [most * mixtures * ci], x)

    def adjoining(self, rows: slice) -> bool:
        """Return whether these rows of the cells of all output groups are adjoining output channels."""
        return self.out_groups == 1 or rows.stop - rows.start == self.cells.shape[1]

    def outputs(self, rows: slice) -> slice:
        """Return those output channels."""
        return slice(rows.start, rows.start + self.out_groups * (rows.stop - rows.start))

    def grouped(self, y: Tensor, rows: slice) -> Tensor:
        """Return the rows' channels of y [batch, *size, out_channels] as [batch, *size, output groups, rows]."""
        return y.unflatten(-1, (self.out_groups, -1))[..., rows]

    def kernels(self, samples: slice, rows: slice) -> Tensor:
        """Return the buffer as [samples, input groups, positions, output groups, rows, ci]."""
        shape = (*self.attention[samples].shape[:4], rows.stop - rows.start, self.cells.shape[2])
        return self.buffer[: math.prod(shape)].view(shape)

    def mix(self, samples: slice, rows: slice) -> Tensor:
        """Return the kernels of the samples, mixed."""
        kernels = self.kernels(samples, rows)
        attention = self.attention[samples].flatten(0, 3)
        mixing.mix(attention, self.cells[:, rows].flatten(1), kernels.view(len(attention), -1))
        return kernels

    def mixture_gradients(self, samples: slice, rows: slice, kernels: Tensor, found: Gradients) -> None:
        """Turn the kernels' gradient into that of α and E; that of α is complete after `finish`."""
        attention = self.attention[samples].flatten(0, 3)
        flat = kernels.view(len(attention), -1)
        if found.attention is not None:
            if self.gradient is None:
                self.gradient = found.attention.new_zeros(self.attention.shape)
            total = self.gradient[samples].flatten(0, 3)
            mixing.attention_gradient(flat, self.cells[:, rows].flatten(1), total)
        if found.cells is not None:
            mixing.cells_gradient(attention, flat, found.cells[:, rows].flatten(1), first=samples.start == 0)

    def finish(self, found: Gradients) -> None:
        """Write the gradient of α in the caller's order."""
        if found.attention is not None and self.gradient is not None:
            put(found.attention, self.order, self.gradient.permute(0, 2, 3, 1, 4))


def _operands(kernels: Tensor) -> Operands:
    """Return kernels [batch, input groups, positions, output groups, rows, ci] by the input channels they take."""
    in_groups, ci = kernels.shape[1], kernels.shape[-1]
    if _are_joined(kernels):
        joined = kernels.permute(0, 2, 3, 4, 1, 5).clone(memory_format=torch.contiguous_format)
        return [(slice(0, in_groups * ci), joined.flatten(4, 5))]
    return [(slice(group * ci, (group + 1) * ci), kernels[:, group]) for group in range(in_groups)]


def _are_joined(kernels: Tensor) -> bool:
    """Return whether the operands of kernels [batch, input groups, …, ci] are copies, wider than their cells."""
    return kernels.shape[1] > 1 and kernels.shape[-1] < JOINED_CHANNELS


def _take_back(operands: Operands, kernels: Tensor) -> None:
    """Copy operands back to the kernels that they were joined from, unless they still are those kernels."""
    if _are_joined(kernels):
        joined = operands[0][1].unflatten(4, (kernels.shape[1], -1))
        kernels.copy_(joined.permute(0, 4, 1, 2, 3, 5))


def _apply(image: Tensor, operands: Operands, out: Tensor) -> None:
    """Write the product of rows [batch, positions, in_channels] with the operands' transposes."""
    for index, (inputs, weights) in enumerate(operands):
        _multiply(image[:, :, inputs], weights.mT, out, first=index == 0)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, first: bool) -> None:
    """Write, the first time, or add the batched product."""
    if len(a) == 1:  # a batched product of one shares its work among threads poorly
        a, b, out = a[0], b[0], out[0]
        if first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif first:
        torch.bmm(a, b, out=out)
    else:
        out.baddbmm_(a, b)
