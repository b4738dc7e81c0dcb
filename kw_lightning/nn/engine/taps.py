"""Where every position of a kernel reads the input: the slices from which all matrix-product forms are made.

A convolution is a sum over kernel positions ("taps"): tap t takes input position stride·o + t·dilation − padding to
output position o. Written as slices of the channels-last input, a tap needs neither padding nor index arithmetic, and
the positions that fall into the padding are simply left out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.partition import Shape

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Tap:
    """One position of the kernel, as slices of [batch, *size, channels] tensors.

    With stride s the input splits into Πs interleaved phase images x[phase::s], and a tap reads only one of them. In
    its phase image a tap is a plain shift, so the gradient of the input needs no products with inserted zeros.

    Attributes:
        source: of the input, the positions that the tap reads.
        target: of the output, the positions that read them.
        phase: the phase image that holds `source`.
        shifted: of the phase image, the same positions as `source`.
        whole: every output position reads through the tap, none the padding.
    """

    source: Slices
    target: Slices
    phase: Shape
    shifted: Slices
    whole: bool


@dataclass(frozen=True)
class Taps:
    """All taps of a convolution at one input size, in the order of the kernel's positions.

    Attributes:
        taps: position (0, …, 0) first, the last dimension fastest; without those that read nothing but padding.
        live: which of the kernel's positions those are.
        size: of the input.
        output_size: of the output.
        stride: of the convolution.
    """

    taps: tuple[Tap, ...]
    live: tuple[int, ...]
    size: Shape
    output_size: Shape
    stride: Shape

    @property
    def pointwise(self) -> bool:
        """Return whether the one tap is the input itself."""
        return len(self.taps) == 1 and self.taps[0].whole and self.size == self.output_size

    def phase_size(self, phase: Shape) -> Shape:
        """Return the size of a phase image."""
        return tuple(-((r - n) // s) for n, r, s in zip(self.size, phase, self.stride, strict=True))

    def phase_slices(self, phase: Shape) -> Slices:
        """Return the slices of a phase image in the input."""
        return tuple(slice(r, None, s) for r, s in zip(phase, self.stride, strict=True))

    def read(self, x: Tensor, tap: Tap, out: Tensor | None = None) -> Tensor:
        """Return what a tap reads, zero where that is padding.

        Args:
            x: [batch, *size, channels].
            out: a tensor for the result; made where None, or the input itself returned where the tap is all of it.

        Returns:
            [batch, *output_size, channels].
        """
        if out is None:
            if self.pointwise:
                return x
            out = x.new_empty(x.shape[0], *self.output_size, x.shape[-1])
        if not tap.whole:
            out.zero_()
        out[every(*tap.target)] = x[every(*tap.source)]
        return out

    def add_back(self, gradient: Tensor, tap: Tap, total: Tensor) -> None:
        """Add the gradient of what a tap read to the gradient of the input: `read` transposed.

        Args:
            gradient: [batch, *output_size, channels].
            total: [batch, *size, channels], changed in place.
        """
        total[every(*tap.source)] += gradient[every(*tap.target)]


def every(*places: slice | int) -> tuple[slice | int, ...]:
    """Return the index of places in every sample of a batch."""
    return (slice(None), *places)


def rows_of(x: Tensor) -> Tensor:
    """Return [batch, *size, channels] as [batch, positions, channels], never a copy."""
    return x.view(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def take(x: Tensor, positions: Sequence[int]) -> Tensor:
    """Return x[:, positions], without a tensor of indices: bringing one to a GPU would wait for all work there."""
    if list(positions) == list(range(x.shape[1])):
        return x
    return torch.stack([x[:, position] for position in positions], dim=1)


def put(x: Tensor, positions: Sequence[int], values: Tensor) -> None:
    """Write x[:, positions] = values, as `take`."""
    if list(positions) == list(range(x.shape[1])):
        x.copy_(values)
        return
    for position, value in zip(positions, values.unbind(1), strict=True):
        x[:, position] = value


@functools.lru_cache(maxsize=4096)
def find_taps(convolution: Convolution, size: Shape) -> Taps:
    """Return the taps of a convolution for inputs of a spatial size."""
    output_size = convolution.output_size(size)
    sides = zip(
        convolution.kernel_shape[2:],
        size,
        output_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        strict=True,
    )
    per_side = [[_side(t * d - p, n, o, s) for t in range(k)] for k, n, o, s, p, d in sides]
    taps = [_join(sides, output_size) for sides in itertools.product(*per_side)]
    live = [index for index, tap in enumerate(taps) if all(t.stop > t.start for t in tap.target)]
    return Taps(tuple(taps[index] for index in live), tuple(live), size, output_size, convolution.stride)


def identity(size: Shape) -> Taps:
    """Return the one tap of a 1×1 convolution with stride 1."""
    whole = tuple(slice(0, n) for n in size)
    tap = Tap(whole, whole, (0,) * len(size), whole, True)
    return Taps((tap,), (0,), size, size, (1,) * len(size))


def _side(offset: int, size: int, output_size: int, stride: int) -> tuple[slice, slice, int, slice]:
    """Return (source, target, phase, shifted) of one dimension."""
    shift, phase = divmod(offset, stride)
    length = max(-((phase - size) // stride), 0)
    first = max(0, -shift)
    last = max(min(output_size, length - shift), first)
    start = phase + stride * (first + shift)
    source = slice(start, start + (last - first - 1) * stride + 1, stride) if last > first else slice(0, 0)
    return source, slice(first, last), phase, slice(first + shift, last + shift)


def _join(sides: Sequence[tuple[slice, slice, int, slice]], output_size: Shape) -> Tap:
    source, target, phase, shifted = zip(*sides, strict=True) if sides else ((), (), (), ())
    whole = all(t.start == 0 and t.stop == n for t, n in zip(target, output_size, strict=True))
    return Tap(source, target, phase, shifted, whole)
