"""Mix kernels, then convolve by the library's own convolution: one call a sample, or one grouped call a chunk.

On large maps a dense convolution of a single sample is as fast as one of a batch, and only its kernel must be mixed
first. Depthwise and grouped convolutions are one grouped call: the literal form, in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine import mixing
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.reference import join_mixtures, split_kernels
from kw_lightning.nn.engine.workspace import sample_chunks, scratch


def forward(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, y: Tensor, grouped: bool) -> None:
    """Write the convolution of every sample with its own kernel.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        y: [batch, out_channels, *output_size], overwritten.
        grouped: one grouped convolution a chunk instead of one convolution a sample.
    """
    work = _Work(x, attention, cells, convolution)
    for samples in work.samples:
        kernels = join_mixtures(work.mix(samples), convolution)
        for part, call in _calls(samples, convolution, grouped):
            weights = kernels[part].flatten(0, 1)
            result = torch.ops.aten.convolution(
                call.fold(x), weights, None, *call.geometry, False, call.no_padding, call.groups
            )
            y[call.samples] = result.view(y[call.samples].shape)


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    wanted: Gradients,
    grouped: bool,
) -> None:
    """Write the gradients; the kernels are mixed anew, chunk by chunk.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, grouped: as in `forward`.
        wanted: where the gradients go; `wanted.x` has its channels first here.
    """
    work = _Work(x, attention, cells, convolution)
    for samples in work.samples:
        mixed = work.mix(samples)
        kernels = join_mixtures(mixed, convolution)
        for part, call in _calls(samples, convolution, grouped):
            weights = kernels[part].flatten(0, 1)
            mask = [wanted.x is not None, wanted.kernels, False]
            grad_x, grad_weights, _ = torch.ops.aten.convolution_backward(
                call.fold(gradient),
                call.fold(x),
                weights,
                None,
                *call.geometry,
                False,
                call.no_padding,
                call.groups,
                mask,
            )
            if wanted.x is not None:
                wanted.x[call.samples] = grad_x.view(x[call.samples].shape)
            if wanted.kernels:
                # The kernels of this part are not read again: their memory takes their gradient.
                mixed[part] = split_kernels(grad_weights.view(-1, *convolution.kernel_shape), convolution)
        work.mixture_gradients(samples, mixed, wanted)


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

    def __init__(self, x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> None:
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

    def mixture_gradients(self, samples: slice, kernels: Tensor, wanted: Gradients) -> None:
        """Turn the gradient of mixtures into that of α and E."""
        attention = self.attention[samples].flatten(0, 1)
        flat = kernels.view(len(attention), -1)
        if wanted.attention is not None:
            mixing.attention_gradient(flat, self.flat, wanted.attention[samples].flatten(0, 1))
        if wanted.cells is not None:
            total = wanted.cells.view(len(self.flat), -1)
            mixing.cells_gradient(attention, flat, total, first=samples.start == 0)
