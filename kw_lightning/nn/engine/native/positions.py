"""What the compiled passes need to know of a convolution: which positions read which, cut into tiles, spans and sums.

Winograd's form (F(2, 3) in every dimension; Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
https://arxiv.org/abs/1509.09308) turns a convolution of 3×3 into 16 products a tile of 2×2 outputs, where there were
36: between sums of input positions, V = Bᵀ·x, and of kernel positions, U = G·w; sums of the products are the outputs.
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
from kw_lightning.nn.engine.taps import Tap, Taps, find_taps
from kw_lightning.nn.partition import Shape

# Output positions that one span of the kernels' gradient takes: what fits the first-level cache.
SPAN_POSITIONS = 192

_INPUT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], device="cpu")
_KERNEL = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], device="cpu")
_OUTPUT = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], device="cpu")


@dataclass(frozen=True)
class Sums:
    """Positions made as sums of others, see pass.h: all int32."""

    start: Tensor
    term: Tensor


@dataclass(frozen=True)
class Direction:
    """How a pass goes from one map to another.

    Attributes:
        tile_start, tile: see pass.h, int32.
        source_sums, out_sums: None where positions are read and written as they are.
    """

    tile_start: Tensor
    tile: Tensor
    source_sums: Sums | None = None
    out_sums: Sums | None = None


@dataclass(frozen=True)
class Reads:
    """A convolution at one input size, as all passes are told it.

    Attributes:
        live: of direct forms, the kernel positions that read anything at all: the taps.
        kernel_positions: of the kernel.
        kernel_transform: G of Winograd's form, [taps, kernel positions], to be applied to α; None in direct forms.
        inputs, outputs: positions between which the passes compute.
    """

    live: tuple[int, ...]
    kernel_positions: int
    kernel_transform: Tensor | None
    inputs: int
    outputs: int

    @functools.cached_property
    def transform(self) -> Tensor | None:
        """Return what makes α of taps of that of kernel positions, [taps, those]; None where they are the same."""
        if self.kernel_transform is not None:
            return self.kernel_transform.to(torch.float32).contiguous()
        if len(self.live) == self.kernel_positions:
            return None
        with torch.inference_mode(False):
            return torch.eye(self.kernel_positions, dtype=torch.float32, device="cpu")[list(self.live)]


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
    """Return whether a convolution has Winograd's form: dense, three kernel positions a dimension, nothing strided."""
    plain = convolution.stride == convolution.dilation == (1,) * convolution.dimensions
    return plain and convolution.groups == 1 and convolution.kernel_shape[2:] == (3,) * convolution.dimensions


@functools.lru_cache(maxsize=256)
def find_positions(convolution: Convolution, size: Shape, rows: int, *, winograd: bool) -> Positions:
    """Return which position reads which for inputs of a spatial size.

    Args:
        rows: most output positions of a tile.
        winograd: in Winograd's form, which the convolution allows.
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
        None,
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
    # Tiles of one position leave the processor waiting for its own sums: rare kinds are taken together.
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
    """Return the runs of positions that every tap's gradient sums over, in spans of few positions, taps in turn."""
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
    """Add what one line of outputs reads through a tap; to the run before, where that goes on."""
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
    tiles = tuple(-(-n // 2) for n in output_size)
    count = math.prod(tiles)
    taps = 4 ** len(size)
    reads = torch.full((taps, taps * count), -1)
    for tap in range(taps):
        reads[tap, tap * count : (tap + 1) * count] = torch.arange(tap * count, (tap + 1) * count)
    table = _tiles(reads, rows)
    sides = zip(size, convolution.padding, tiles, strict=True)
    inputs = [_side(_INPUT, n, n_tiles, -p) for n, p, n_tiles in sides]
    outputs = [_side(_OUTPUT.t(), n, n_tiles, 0) for n, n_tiles in zip(output_size, tiles, strict=True)]
    transform = functools.reduce(torch.kron, [_KERNEL] * len(size))
    spans: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int, int, int]] = []
    for first in range(0, count, SPAN_POSITIONS):
        length = min(SPAN_POSITIONS, count - first)
        for tap in range(taps):
            runs.append((tap * count + first, tap * count + first, 1, length))
            spans.append((tap, int(first > 0), len(spans), len(runs)))
    return Positions(
        tuple(range(taps)),
        3 ** len(size),
        transform,
        taps * count,
        taps * count,
        Direction(*table, _sums(inputs, tiles, into=True), _sums(outputs, tiles, into=False)),
        Direction(*table, _sums(outputs, tiles, into=True), _sums(inputs, tiles, into=False)),
        reads.int(),
        _table(spans),
        _table(runs),
    )


def _side(transform: Tensor, size: int, tiles: int, first: int) -> Tensor:
    """Return one dimension's transform [4, tiles, size]: of tiles that start at `first` and are 2 positions apart."""
    whole = torch.zeros(4, tiles, size, dtype=torch.long)
    for tile in range(tiles):
        for element in range(transform.shape[1]):
            place = first + 2 * tile + element
            if 0 <= place < size:
                whole[:, tile, place] = transform[:, element]
    return whole


def _sums(sides: Sequence[Tensor], tiles: Shape, *, into: bool) -> Sums:
    """Return the sums of all dimensions' transforms: into the transformed positions, or, transposed, out of them."""
    position_steps = [math.prod(side.shape[2] for side in sides[d + 1 :]) for d in range(len(sides))]
    tile_steps = [math.prod(tiles[d + 1 :]) for d in range(len(tiles))]
    tap_steps = [math.prod(tiles) * 4 ** (len(sides) - 1 - d) for d in range(len(sides))]
    places, signs = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
    for side, position, tile, tap in zip(sides, position_steps, tile_steps, tap_steps, strict=True):
        matrix = side.flatten(0, 1) if into else side.flatten(0, 1).t()
        width = int((matrix != 0).sum(1).max())
        column = torch.argsort((matrix != 0).int(), dim=1, descending=True, stable=True)[:, :width]
        sign = matrix.gather(1, column)
        place = column * position if into else column // side.shape[1] * tap + column % side.shape[1] * tile
        places = (places[:, None, :, None] + place[None, :, None, :]).flatten(2).flatten(0, 1)
        signs = (signs[:, None, :, None] * sign[None, :, None, :]).flatten(2).flatten(0, 1)
    if into:  # rows are (tap, tile) of every dimension: all taps first
        shape = [number for n in tiles for number in (4, n)]
        order = [*range(0, len(shape), 2), *range(1, len(shape), 2), len(shape)]
        places, signs = (t.view(*shape, -1).permute(order).flatten(0, -2) for t in (places, signs))
    used = signs != 0
    start = torch.zeros(len(used) + 1, dtype=torch.int32)
    start[1:] = used.sum(1).cumsum(0)
    return Sums(start, ((places + 1) * signs)[used].int())
