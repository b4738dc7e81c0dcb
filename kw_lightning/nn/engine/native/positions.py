"""Which positions of a convolution read which, for the compiled passes: in tiles, spans and windows.

Winograd's form (F(2, 3) in every dimension; Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
https://arxiv.org/abs/1509.09308) computes a 3×3 convolution with 16 products per window of 2×2 outputs instead of 36:
products of sums of input positions, V = Bᵀ·x, and of kernel positions, U = G·w; their sums are the outputs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.taps import Tap, Taps, find_taps
from kw_lightning.nn.partition import Shape

# Output positions in a span of the kernels' gradient: as many as fit in the first-level cache.
SPAN_POSITIONS = 192


@dataclass(frozen=True)
class Windows:
    """How Winograd's windows lie on a map, each two positions after the one before: see winograd.h.

    Attributes:
        reach: positions of a window per dimension.
        size: of the map.
        count: windows per dimension.
        first: the position at which the first window begins.
    """

    reach: int
    size: Shape
    count: Shape
    first: Shape

    def told(self) -> layout.Windows:
        """Return it as an argument of a pass."""
        sides = ((ctypes.c_int32 * 3)(*side) for side in (self.size, self.count, self.first))
        return layout.Windows(len(self.size), self.reach, *sides)


@dataclass(frozen=True)
class Direction:
    """How a pass goes from one map to another.

    Attributes:
        tile_start, tile: see pass.h, int32.
        source, out: the windows of the maps that are read and written in Winograd's form; else None.
    """

    tile_start: Tensor
    tile: Tensor
    source: Windows | None = None
    out: Windows | None = None


@dataclass(frozen=True)
class Reads:
    """A convolution at one input size: what all passes need of it.

    Attributes:
        live: the kernel positions that read anything but padding.
        kernel_positions: of the kernel.
        taps: through which the passes read: as many as `live`, or Winograd's transformed kernel positions.
        inputs, outputs: positions between which the passes compute.
    """

    live: tuple[int, ...]
    kernel_positions: int
    taps: int
    inputs: int
    outputs: int

    @functools.cached_property
    def selection(self) -> Tensor | None:
        """Return the live positions, int32; None if all are."""
        if len(self.live) == self.kernel_positions:
            return None
        with torch.inference_mode(False):
            return torch.tensor(self.live, dtype=torch.int32, device="cpu")


@dataclass(frozen=True)
class Positions(Reads):
    """A convolution at one input size.

    Attributes:
        forward, backward: from input to output, and from the output's gradient to the input's.
        reads: [taps, outputs], the input position that each output reads, -1 for none; int32.
        span, run: of the kernels' gradient, int32.
    """

    forward: Direction
    backward: Direction
    reads: Tensor
    span: Tensor
    run: Tensor


def allows_winograd(convolution: Convolution) -> bool:
    """Return whether Winograd's form computes a convolution: dense, kernels of size 3, stride and dilation 1."""
    plain = convolution.stride == convolution.dilation == (1,) * convolution.dimensions
    return plain and convolution.groups == 1 and convolution.kernel_shape[2:] == (3,) * convolution.dimensions


@functools.lru_cache(maxsize=256)
def find_positions(convolution: Convolution, size: Shape, rows: int, *, winograd: bool) -> Positions:
    """Return which position reads which for inputs of a spatial size.

    Args:
        rows: most output positions in a tile.
        winograd: in Winograd's form, if `allows_winograd`.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return _winograd(convolution, size, rows) if winograd else _direct(convolution, size, rows)


def _direct(convolution: Convolution, size: Shape, rows: int) -> Positions:
    taps = find_taps(convolution, size)
    inputs = torch.arange(math.prod(size)).view(size)
    outputs = torch.arange(math.prod(taps.output_size)).view(taps.output_size)
    reads = torch.full((len(taps.taps), outputs.numel()), -1)
    gives = torch.full((len(taps.taps), inputs.numel()), -1)
    for index, tap in enumerate(taps.taps):
        source, target = inputs[tap.source].flatten(), outputs[tap.target].flatten()
        reads[index, target] = source
        gives[index, source] = target
    span, run = _spans(taps)
    return Positions(
        taps.live,
        math.prod(convolution.kernel_shape[2:]),
        len(taps.live),
        inputs.numel(),
        outputs.numel(),
        Direction(*_tiles(reads, rows)),
        Direction(*_tiles(gives, rows)),
        reads.int(),
        span,
        run,
    )


def _tiles(reads: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cut output positions into tiles that read through the same taps.

    Args:
        reads: [taps, positions], the position that each reads through a tap; -1 for none.
        rows: most positions of a tile.
    """
    live, kind = torch.unique(reads >= 0, dim=1, return_inverse=True)
    counts = torch.bincount(kind, minlength=live.shape[1])
    # In tiles of few positions every sum waits for the one before, so rare kinds share tiles.
    few = counts * 2 < rows
    kinds = [(kind == index).nonzero().flatten() for index in (~few).nonzero().flatten().tolist()]
    kinds.append(few[kind].nonzero().flatten())
    blocks: list[Tensor] = []
    starts: list[Tensor] = []
    total = 0
    for positions in kinds:
        if not len(positions):
            continue
        taps = (reads[:, positions] >= 0).any(1).nonzero().flatten()
        tiles = -(-len(positions) // rows)
        size, larger = divmod(len(positions), tiles)
        cut = (tiles - larger) * size
        for part, count in ((positions[:cut], size), (positions[cut:], size + 1)):
            if not len(part):
                continue
            places = part.view(-1, count)
            head = torch.tensor([count, len(taps)]).expand(len(places), 2)
            entries = torch.cat([taps.view(-1, 1, 1).expand(-1, len(places), 1), reads[taps][:, places]], 2)
            block = torch.cat([head, places, entries.transpose(0, 1).flatten(1)], 1)
            starts.append(total + torch.arange(len(block)) * block.shape[1])
            blocks.append(block.flatten())
            total += block.numel()
    return torch.cat(starts).int(), torch.cat(blocks).int()


def _spans(taps: Taps) -> tuple[Tensor, Tensor]:
    """Return the runs of positions that each tap's gradient sums over, in short spans, each for all taps in turn."""
    spans: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    lines = list(itertools.product(*map(range, taps.output_size[:-1])))
    length = max(SPAN_POSITIONS // max(taps.output_size[-1], 1), 1)
    started: set[int] = set()
    for first in range(0, len(lines), length):
        for index, tap in enumerate(taps.taps):
            before = len(runs)
            for line in lines[first : first + length]:
                _add_run(runs, before, taps, tap, line)
            if len(runs) > before:
                spans.append((index, int(index in started), before, len(runs)))
                started.add(index)
    return _table(spans), _table(runs)


def _add_run(runs: list[tuple[int, int, int, int]], first: int, taps: Taps, tap: Tap, line: Shape) -> None:
    """Add the run that one line of outputs reads through a tap, joined to the last run if it continues that."""
    if not all(target.start <= place < target.stop for place, target in zip(line, tap.target[:-1], strict=True)):
        return
    target, source = tap.target[-1], tap.source[-1]
    sides = zip(line, tap.target[:-1], tap.source[:-1], taps.stride[:-1], strict=True)
    reads = [s.start + (place - t.start) * step for place, t, s, step in sides]
    first_output = _flat((*line, target.start), taps.output_size)
    first_input = _flat((*reads, source.start), taps.size)
    length = target.stop - target.start
    if len(runs) > first and taps.stride[-1] == 1:
        output, position, _, before = runs[-1]
        if (output + before, position + before) == (first_output, first_input):
            runs[-1] = (output, position, 1, before + length)
            return
    runs.append((first_output, first_input, taps.stride[-1], length))


def _flat(place: Shape, size: Shape) -> int:
    index = 0
    for one, side in zip(place, size, strict=True):
        index = index * side + one
    return index


def _table(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1)


def _winograd(convolution: Convolution, size: Shape, rows: int) -> Positions:
    output_size = convolution.output_size(size)
    windows = tuple(-(-n // 2) for n in output_size)
    count = math.prod(windows)
    taps = 4 ** len(size)
    reads = torch.full((taps, taps * count), -1)
    for tap in range(taps):
        reads[tap, tap * count : (tap + 1) * count] = torch.arange(tap * count, (tap + 1) * count)
    table = _tiles(reads, rows)
    inputs = Windows(4, size, windows, tuple(-before for before in convolution.padding))
    outputs = Windows(2, output_size, windows, (0,) * len(size))
    spans: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    for first in range(0, count, SPAN_POSITIONS):
        length = min(SPAN_POSITIONS, count - first)
        for tap in range(taps):
            runs.append((tap * count + first, tap * count + first, 1, length))
            spans.append((tap, int(first > 0), len(spans), len(runs)))
    return Positions(
        tuple(range(3 ** len(size))),
        3 ** len(size),
        taps,
        taps * count,
        taps * count,
        Direction(*table, inputs, outputs),
        Direction(*table, outputs, inputs),
        reads.int(),
        _table(spans),
        _table(runs),
    )
