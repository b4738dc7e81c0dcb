"""What paths that mix whole kernels and pass them to the library's own convolution have in common.

On large maps a dense convolution of a single sample is as efficient as one of a batch, once its kernel is mixed.
Depthwise and grouped convolutions are one grouped call: the literal form, in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kw_lightning.nn.engine import mixing
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Load, narrow
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.orders import count
from kw_lightning.nn.engine.paths.path import Path
from kw_lightning.nn.engine.problem import Operands, Problem
from kw_lightning.nn.engine.reference import join_mixtures, split_kernels
from kw_lightning.nn.engine.workspace import sample_chunks, scratch

# How many times as long a multiply-add of a grouped convolution takes on a GPU.
GROUPED = 4.0


class CallingPath(Path):
    """A path by the library's convolution.

    Attributes:
        grouped: one grouped convolution per chunk of samples, instead of one convolution per sample.
    """

    grouped: ClassVar[bool]

    def refusal(self, problem: Problem) -> str | None:
        """Return None: it can compute everything."""
        return None

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass.

        Kernels are mixed, laid out as the convolution takes them, and read by it. On a GPU a map with its channels last
        is copied to be folded, and results are copied into place.
        """
        convolution, batch = problem.convolution, problem.batch
        sizes = math.prod(problem.size), math.prod(convolution.output_size(problem.size))
        counted = count("mix_kernels", convolution, problem.cells, *sizes)
        kernel, stored = math.prod(convolution.kernel_shape), problem.cells * math.prod(convolution.cell_shape)
        x, y = convolution.kernel_shape[1] * convolution.groups * sizes[0], convolution.kernel_shape[0] * sizes[1]
        chunks = len(sample_chunks(batch, kernel * problem.dtype.itemsize, problem.device))
        calls = chunks if self.grouped else batch
        mixing, products = batch * counted.mixing, batch * counted.products
        if problem.on_cpu:
            rows = batch / max(chunks, 1) * kernel / math.prod(convolution.cell_shape)
            return Load(mixing, products, batch * (kernel + x + y), calls + chunks, (narrow(rows), 1.0))
        folded = 3 if self.grouped and batch > 1 else 1
        cast = 2 * stored if problem.dtype.itemsize < 4 else 0
        elements = cast + chunks * stored + batch * (4 * kernel + folded * x + 3 * y)
        slower = GROUPED if self.grouped or convolution.groups > 1 else 1.0
        return Load(mixing, products, elements, 2 + 2 * chunks + 3 * calls, (1.0, slower))

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, convolution = operands.x, operands.convolution
        work = _Work(operands)
        for samples in work.samples:
            kernels = join_mixtures(work.mix(samples), convolution)
            for part, call in _calls(samples, convolution, self.grouped):
                weights = kernels[part].flatten(0, 1)
                result = torch.ops.aten.convolution(
                    call.fold(x), weights, None, *call.geometry, False, call.no_padding, call.groups
                )
                y[call.samples] = result.view(y[call.samples].shape)

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients; the kernels are mixed anew, chunk by chunk."""
        x, attention, cells, convolution, *_ = operands
        found = new_gradients(x, attention, cells, needed)
        work = _Work(operands)
        for samples in work.samples:
            mixed = work.mix(samples)
            kernels = join_mixtures(mixed, convolution)
            for part, call in _calls(samples, convolution, self.grouped):
                grad_x, grad_weights, _ = torch.ops.aten.convolution_backward(
                    call.fold(gradient),
                    call.fold(x),
                    kernels[part].flatten(0, 1),
                    None,
                    *call.geometry,
                    False,
                    call.no_padding,
                    call.groups,
                    [needed[0], found.of_kernels, False],
                )
                if found.x is not None:
                    found.x[call.samples] = grad_x.view(x[call.samples].shape)
                if found.of_kernels:
                    # The kernels of this part are not read again: their memory takes their gradient.
                    mixed[part] = split_kernels(grad_weights.view(-1, *convolution.kernel_shape), convolution)
            work.mixture_gradients(samples, mixed, found)
        return found


@dataclass(frozen=True)
class _Call:
    """One convolution call: which samples of the batch it takes, and its arguments."""

    samples: slice
    geometry: tuple[list[int], list[int], list[int]]  # stride, padding, dilation
    no_padding: list[int]  # of the output, for transposed convolutions alone
    groups: int

    def fold(self, x: Tensor) -> Tensor:
        """Return the samples as one sample with the channels of all."""
        x = x[self.samples]
        return x if len(x) == 1 else x.reshape(1, -1, *x.shape[2:])


def _calls(samples: slice, convolution: Convolution, grouped: bool) -> Iterator[tuple[slice, _Call]]:
    """Yield (samples within the chunk, call)."""
    count = samples.stop - samples.start
    geometry = list(convolution.stride), list(convolution.padding), list(convolution.dilation)
    step = count if grouped else 1
    for start in range(0, count, step):
        place = slice(samples.start + start, samples.start + start + step)
        call = _Call(place, geometry, [0] * convolution.dimensions, step * convolution.groups)
        yield slice(start, start + step), call


class _Work:
    """The buffer of per-sample kernels, and the mixing products that fill and read it."""

    def __init__(self, operands: Operands) -> None:
        x, attention, cells, *_ = operands
        self.attention, self.flat, self.shape = attention, cells.flatten(1), cells.shape[1:]
        batch, mixtures, _ = attention.shape
        size = mixtures * math.prod(self.shape)
        self.samples = sample_chunks(batch, size * x.element_size(), x.device)
        self.buffer = scratch("kernels", [(self.samples[0].stop - self.samples[0].start) * size], x)

    def mix(self, samples: slice) -> Tensor:
        """Return the mixtures of the samples [samples, mixtures, co, ci, *ck]."""
        attention = self.attention[samples]
        rows = attention.shape[0] * attention.shape[1]
        mixed = self.buffer[: rows * self.flat.shape[1]]
        mixing.mix(attention.flatten(0, 1), self.flat, mixed.view(rows, -1))
        return mixed.view(*attention.shape[:2], *self.shape)

    def mixture_gradients(self, samples: slice, kernels: Tensor, found: Gradients) -> None:
        """Turn the gradient of mixtures into that of α and E."""
        attention = self.attention[samples].flatten(0, 1)
        flat = kernels.view(len(attention), -1)
        if found.attention is not None:
            mixing.attention_gradient(flat, self.flat, found.attention[samples].flatten(0, 1))
        if found.cells is not None:
            total = found.cells.view(len(self.flat), -1)
            mixing.cells_gradient(attention, flat, total, first=samples.start == 0)
