"""How the pass of depthwise convolutions walks over maps: line by line, in strips that stay in the nearest caches.

A line is the last dimension of a map, or of a kernel. Through one line of the kernel, a line of the output reads one
line of the source or none; its taps are evenly spaced, and zeros around the line stand for the padding. The gradient of
the input goes the other way: with a stride, the positions of each phase read taps of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.positions import Reads
from kw_lightning.nn.partition import Shape

STRIP_BYTES = 64 * 1024
"""For the lines that a strip reads and writes, of one block of lanes: a part of the second-level cache."""


class Phase(NamedTuple):
    """The positions of a line that read through the same taps: see pass.h."""

    first: int
    step: int
    positions: int
    taps: int
    tap: int
    tap_step: int
    read: int
    read_step: int
    tap_read: int


@dataclass(frozen=True)
class Walk:
    """A walk from the lines of one map to those of another, see pass.h; tables are int32."""

    out: int
    source: int
    lines: int
    before: int
    room: int
    strip: int
    held: int
    taps: int
    reads: Tensor
    range: Tensor
    phase: Tensor

    def told(self) -> layout.Walk:
        """Return it as an argument of a pass."""
        numbers = self.out, self.source, self.lines, self.before, self.room, self.strip, self.held, self.taps
        tables = self.reads, self.range, self.phase
        return layout.Walk(*numbers, len(self.phase), *(table.data_ptr() for table in tables))


@dataclass(frozen=True)
class Walks(Reads):
    """A depthwise convolution at one input size.

    Attributes:
        forward, backward: from input to output, and from the output's gradient to the input's.
    """

    forward: Walk
    backward: Walk


class _Side(NamedTuple):
    """One dimension.

    Attributes:
        taps: from the first that reads anything to the last.
        reads: [taps, outputs], the position that each reads; -1 for none.
        gives: [taps, inputs], the output that reads it.
    """

    taps: range
    reads: Tensor
    gives: Tensor


@functools.lru_cache(maxsize=256)
def find_walks(convolution: Convolution, size: Shape, strip: int) -> Walks:
    """Return the walks over inputs of a spatial size.

    Args:
        strip: about how many positions a strip reads and writes.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return _find(convolution, size, strip)


def _find(convolution: Convolution, size: Shape, strip: int) -> Walks:
    output_size, kernel = convolution.output_size(size), convolution.kernel_shape[2:]
    numbers = zip(kernel, size, output_size, convolution.stride, convolution.padding, convolution.dilation, strict=True)
    sides = [_side(*numbers_of_one) for numbers_of_one in numbers]
    live = torch.arange(math.prod(kernel)).view(kernel)[tuple(slice(s.taps.start, s.taps.stop) for s in sides)]
    step, padding, dilation = convolution.stride[-1], convolution.padding[-1], convolution.dilation[-1]
    taps = sides[-1].taps
    whole = Phase(0, 1, output_size[-1], len(taps), 0, 1, taps[0] * dilation - padding, step, dilation)
    phases = [_phase(size[-1], phase, taps, step, padding, dilation) for phase in range(min(step, size[-1]))]
    return Walks(
        tuple(live.flatten().tolist()),
        math.prod(kernel),
        live.numel(),
        math.prod(size),
        math.prod(output_size),
        _walk(_join([side.reads for side in sides[:-1]], size), output_size, size, len(taps), [whole], strip),
        _walk(_join([side.gives for side in sides[:-1]], output_size), size, output_size, len(taps), phases, strip),
    )


def _side(taps: int, size: int, output_size: int, stride: int, padding: int, dilation: int) -> _Side:
    outputs, inputs = torch.arange(output_size), torch.arange(size)
    offsets = torch.arange(taps).view(-1, 1) * dilation - padding
    reads = outputs * stride + offsets
    reads = reads.where((reads >= 0) & (reads < size), -1)
    ahead = inputs - offsets
    gives = (ahead // stride).where((ahead % stride == 0) & (ahead >= 0) & (ahead // stride < output_size), -1)
    alive = (reads >= 0).any(1).nonzero().flatten().tolist()
    live = range(alive[0], alive[-1] + 1)
    return _Side(live, reads[live.start : live.stop], gives[live.start : live.stop])


def _join(sides: Sequence[Tensor], size: Shape) -> Tensor:
    """Return the line that each line reads through each line of the kernel, from the tables of the other dimensions."""
    lines = torch.zeros(1, 1, dtype=torch.long)
    for side, positions in zip(sides, size, strict=False):
        before, here = lines[:, None, :, None], side[None, :, None, :]
        joined = (before * positions + here).where((before >= 0) & (here >= 0), -1)
        lines = joined.flatten(2).flatten(0, 1)
    return lines


def _phase(size: int, phase: int, taps: range, stride: int, padding: int, dilation: int) -> Phase:
    """Return how the input's gradient is made at every stride-th position from `phase` on."""
    count = -(-(size - phase) // stride)
    ahead = [(tap - taps[0], phase + padding - tap * dilation) for tap in taps]
    reads = [(tap, offset // stride) for tap, offset in ahead if offset % stride == 0]
    if not reads:
        return Phase(phase, stride, count, 0, 0, 0, 0, 1, 0)
    (tap, read), (next_tap, next_read) = reads[0], reads[min(1, len(reads) - 1)]
    return Phase(phase, stride, count, len(reads), tap, next_tap - tap, read, 1, next_read - read)


def _walk(reads: Tensor, size: Shape, source_size: Shape, taps: int, phases: Sequence[Phase], strip: int) -> Walk:
    """Return the walk: with room for what the phases read outside of a line, and the lines cut into strips."""
    ends = [(f.read, f.read + (f.taps - 1) * f.tap_read) for f in phases if f.taps]
    last = [(f.positions - 1) * f.read_step for f in phases if f.taps]
    before = max(0, *(-min(end) for end in ends))
    after = max(0, *(max(end) + far - source_size[-1] + 1 for end, far in zip(ends, last, strict=True)))
    room, lines = before + source_size[-1] + after, reads.shape[1]
    table = [f._replace(read=f.read + before if f.taps else 0) for f in phases]
    sizes = sorted({-(-lines // count) for count in range(1, lines + 1)}, reverse=True)
    for count in sizes:
        ranges = _ranges(reads, count)
        held = int(ranges[:, 1].max())
        if held * room + count * size[-1] <= strip:
            break
    return Walk(
        size[-1],
        source_size[-1],
        lines,
        before,
        room,
        count,
        held,
        taps,
        reads.int().contiguous(),
        ranges.int().contiguous(),
        torch.tensor(table, dtype=torch.int32),
    )


def _ranges(reads: Tensor, strip: int) -> Tensor:
    """Return for each strip the first line of the source that it reads, and the number of lines; (0, 0) for none."""
    strips = -(-reads.shape[1] // strip)
    none = reads.new_full((len(reads), strips * strip - reads.shape[1]), -1)
    parts = torch.cat([reads, none], 1).view(len(reads), strips, strip).transpose(0, 1).flatten(1)
    first = parts.where(parts >= 0, parts.max() + 1).amin(1)
    end = parts.amax(1) + 1
    return torch.stack([first.where(end > 0, 0), (end - first).where(end > 0, 0)], 1)
