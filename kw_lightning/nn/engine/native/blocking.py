"""How the work of a compiled pass is cut so that what is used together stays in the cache; pass.h shows the loops.

A number has 4 bytes. A block is `width` lanes by `depths` depths of every cell; the kernels of `mixed` samples are
mixed from it, used and overwritten. All sizes follow from the shapes and the bounds here: nothing is measured at run
time. In the docstrings, "what `BYTES` hold of a · b" is the largest count of items of a · b numbers that fit in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

NUMBER = 4
"""Bytes of a number."""
BLOCK_BYTES = 160 * 1024
"""For one block of all cells, which shares the second-level cache with the kernels that are mixed from it.

Half and twice this bound and the two below were as fast with 0.5 MB of second-level cache and 8 MB of third-level."""
TILE_BYTES = 16 * 1024
"""For the part of a kernel that a tile of positions reads at a time, and the next tile from the first-level cache."""
KERNEL_BYTES = 192 * 1024
"""For the kernels that are mixed from one block and exist at once."""
LINE_BYTES = 3 * 2**20
"""For the kernels that `block_lines` mixes and keeps at once; they stream from the second or third-level cache."""
GATHERED_BYTES = 5 * 2**20
"""For kernels that are mixed from all blocks before they are used."""
PART_BYTES = 3 * 2**19
"""For the parts of kernels, and of cells, that `block_rows` keeps at once."""
LEAST_TERMS = 64
"""Lines of all groups that are added to the input's gradient at a time; with fewer, moving its sums dominates."""
SHARED_BYTES = 6 * 2**20
"""For the parts of kernels that all threads share, in the third-level cache."""
MOST_RUN = 512
"""Most numbers of a cell that are mixed at a time."""
OWN_LINES = 64
"""With so many lines, of all groups, a block lays out the source for itself, which is then little of the work.

Not in strided convolutions, whose positions are picked one by one."""
LEAST_LINES = 6
"""Fewest lines of a block; with fewer, registers of the products stay empty."""
MAP_BYTES = 4 * 2**20
"""For the maps that are read together, and stay in the third-level cache."""
MOST_MAPS = 8
"""Up to so many times `MAP_BYTES` are read together, if packing the cells again would cost more than a few percent."""
PACKING = 500
"""Multiply-adds that take as long as packing one number of a cell."""
PACKED_AGAIN = 8
"""How often kernels could be moved in the time in which their blocks are packed once more."""
BRINGING = 250
"""Multiply-adds that take as long as loading one number of a kept basis from memory."""
TURNING = 5
"""Cells that are packed in the time in which one kernel is mixed from unpacked cells, and transposed."""
TURNED = 4
"""Lanes that are transposed together."""
PANEL_BYTES = 3 * 2**16
"""For columns of kernels that `block_rows` mixes, then transposes: the second-level cache holds them meanwhile."""
LINE = 16
"""Numbers in a cache line."""
NARROW = 16
"""Lanes of the narrowest vectors: processors with wider ones have larger caches."""
LEAST_DEPTHS = 8
"""Fewest depths of a block backward; with fewer, its products are too short."""
LEAST_BASES = 4
"""Fewest depths of a block of bases, which are many; with fewer, registers of the products stay empty."""
IMBALANCE = 1.1
"""How many times the threads' average the busiest thread may take."""


class Extents(NamedTuple):
    """How much work there is to cut, in the terms of pass.h.

    Attributes:
        batch, rows, cells: samples, mixtures of a sample, n.
        groups, cell_groups: of the convolution itself, whose channels are side by side.
        lanes, depths, lane_groups, depth_groups: the channel axes of a cell, and the cells along each.
        source_positions, out_positions: positions that the pass reads and writes.
        threads: number of threads that share the work.
        width: lanes of a block.
        limit: bytes of kernels that may exist at once, in all threads together.
        ranks: bases of a mixture, 0 if kernels are mixed from cells.
        vectors: 1 or 2, that the lanes of a block fill.
        taps: through which a position reads.
        strips: of a sample, which threads may share.
        kept: the mixed bases are kept, and need not be mixed again.
    """

    batch: int
    rows: int
    cells: int
    lanes: int
    depths: int
    lane_groups: int
    depth_groups: int
    source_positions: int
    out_positions: int
    threads: int
    width: int
    limit: int
    ranks: int = 0
    groups: int = 1
    cell_groups: int = 1
    vectors: int = 2
    taps: int = 1
    strips: int = 1
    kept: bool = False

    @property
    def widest(self) -> int:
        """Return the lanes of two vectors."""
        return self.width * 2 // self.vectors

    @property
    def uses(self) -> int:
        """Return at how many positions each number of a kernel is used."""
        taps = max(self.rows // (self.groups * self.lane_groups * self.depth_groups), 1)
        return min(self.source_positions, self.out_positions) * self.taps // taps

    def scaled(self, bytes: int) -> int:
        """Return a bound in bytes, scaled to the caches of a processor with vectors of this width."""
        return bytes * (self.widest // NARROW)


@dataclass(frozen=True)
class Blocking:
    """How the work is cut.

    Attributes:
        depths: of a block of cells.
        mixed: samples whose kernels of one block exist at once in a thread.
        read: samples whose maps are read together.
        parts: number of parts that the samples are cut into, for equal shares among the threads.
        direct: kernels are mixed from unpacked cells, and `depths` are the kernels'.
        tile: depths that a tile takes at a time, 0 for all of the block's.
        lines: of a cell, whose kernels exist at once where cells are mixed line by line.
        gathers: kernels are mixed from all blocks before they are used.
    """

    depths: int
    mixed: int
    read: int
    parts: int
    direct: bool = False
    tile: int = 0
    lines: int = 0
    gathers: bool = False


def block_kernels(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes kernels.

    depths = what `BLOCK_BYTES` (backward half of it: the transposed block takes the other half) hold of cells · width;
    forward in whole cache lines, since depths are contiguous in E.
    mixed = what `KERNEL_BYTES` hold of rows · (depths + 1) · width.
    """
    direct = None if backward else _block_lying(extents)
    if direct is not None:
        return direct
    e = extents
    block = e.scaled(BLOCK_BYTES) // (2 if backward else 1)
    most = block // (NUMBER * e.cells * e.width)
    if backward:
        depths = _even(e.depths, _between(LEAST_DEPTHS, most, e.depths), LEAST_DEPTHS)
    else:
        depths = _even(e.depths, _between(LINE, most // LINE * LINE, e.depths), LINE)
    sample = NUMBER * e.rows * (depths + 1) * e.width
    parts = share(e)
    found = Blocking(depths, _between(1, _kernel_bytes(e) // sample, e.batch), _read(e, parts), parts)
    return _gathered(found, e, backward=backward)


def _gathered(found: Blocking, extents: Extents, *, backward: bool) -> Blocking:
    """Let the kernels of all blocks be mixed before they are used, if that moves fewer numbers.

    Otherwise a sample's outputs, out positions · width numbers, are read and written again for every block but the
    first. Here its kernels are instead, rows · depths · width numbers, once; backward that counts `PACKED_AGAIN` times,
    since blocks are packed again for the gradients. The kernels of all samples that are read together must fit in
    `GATHERED_BYTES`; where bases are kept, only as many samples are read as do.
    """
    e, blocks, read = extents, -(-extents.depths // found.depths), found.read
    held = min(e.scaled(GATHERED_BYTES), e.limit // e.threads) // (NUMBER * e.rows * (e.depths + 1) * e.width)
    if e.kept and held > 0:
        read = _even(e.batch, min(read, held * found.parts), found.parts)
    mixed, moved = -(-read // found.parts), e.rows * e.depths * (PACKED_AGAIN if backward else 1)
    if mixed > held or (blocks - 1) * e.lane_groups * e.groups * e.out_positions <= moved:
        return found
    return replace(found, mixed=mixed, read=read, tile=_tile_depths(e), gathers=True)


def _block_lying(extents: Extents) -> Blocking | None:
    """Cut a forward pass that mixes few kernels from unpacked cells; None where packing the cells is no more work.

    The kernels of all samples exist at once, with what `KERNEL_BYTES` hold of rows · (width + TURNED) · samples as
    their depths: cells are then read once, along their lines.
    """
    e, parts = extents, share(extents)
    read = _read(e, parts)
    samples = -(-read // parts)
    squares = e.lanes % TURNED == 0 == TURNED * e.depths % e.widest
    if not squares or e.ranks or read < e.batch or not mixes_few(e.rows * samples, e.cells):
        return None
    most, tile = _kernel_bytes(e) // (NUMBER * e.rows * (e.width + TURNED) * samples) - 1, _tile_depths(e)
    if most >= e.depths:
        return Blocking(e.depths, samples, read, parts, direct=True, tile=tile)
    depths = min(most // e.widest * e.widest, e.depths)
    if depths == 0 or e.depths % e.widest:
        return None
    tile = min(tile, depths)
    return Blocking(depths // tile * tile, samples, read, parts, direct=True, tile=tile)


def block_lines(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes kernels line by line, from unpacked cells.

    depths = what `BLOCK_BYTES` hold of cells, in whole vectors.
    lines = what `LINE_BYTES` hold of rows · (depths of a cell) · samples, at least `LEAST_LINES`; as many blocks as go
    evenly among the threads if each then has `LEAST_LINES`, otherwise threads share parts of the samples.
    mixed = what `LINE_BYTES` hold of rows · (depths of a cell) · lines.
    """
    if backward:
        return _block_lines_backward(extents)
    e, wide = extents, extents.widest
    most = e.scaled(BLOCK_BYTES) // (NUMBER * e.cells) // wide * wide
    depths = _even(e.depths, _between(wide, most, e.depths), wide)
    line = NUMBER * e.rows * -(-e.depths // wide) * wide
    held = max(min(e.scaled(LINE_BYTES), e.limit // e.threads) // line, 1)
    blocks = -(-e.lanes // _between(LEAST_LINES, held // e.batch, e.lanes))
    shared, parts = -(-blocks // e.threads) * e.threads, 1
    if e.lanes >= shared * LEAST_LINES:
        blocks = shared
    else:
        parts = share(e._replace(lanes=blocks * e.width, cell_groups=1))
    lines = -(-e.lanes // blocks)
    if e.source_positions == e.out_positions and lines * e.lane_groups >= OWN_LINES:
        read = 0
    else:
        read = _read(e._replace(source_positions=e.out_positions), parts)
    return Blocking(depths, _between(1, held // lines, -(-(read or e.batch) // parts)), read, parts, lines=lines)


def _block_lines_backward(extents: Extents) -> Blocking:
    """Cut the gradients of `block_lines`, for which the whole kernels of some samples exist.

    depths = `_run`, in numbers of a cell. mixed = what `SHARED_BYTES` hold of rows · lanes · depths, the kernels of a
    sample. read = what `MAP_BYTES` hold of both maps of a sample, which are read twice.
    """
    e = extents
    kernels = min(e.scaled(SHARED_BYTES), e.limit) // (NUMBER * e.rows * e.lanes * e.depths)
    maps = NUMBER * e.source_positions * (e.lanes * e.lane_groups + e.depths * e.depth_groups)
    mixed = _between(1, kernels, e.batch)
    return Blocking(_run(e), mixed, _between(1, MAP_BYTES // maps, mixed), 1)


def block_rows(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes kernels from unpacked cells, between maps whose channels are last.

    depths = `_run`, in numbers of a cell.
    Forward, lines = what `PART_BYTES` hold of rows · depths · samples, for each thread; mixed = what they hold of
    rows · depths · lines; and depths is no more than `PANEL_BYTES` hold of rows · mixed · (lanes of two vectors).
    Backward, lines = what `PART_BYTES` hold of cells · lanes, for all threads, at least `LEAST_TERMS` of all groups;
    mixed = what `SHARED_BYTES` hold of rows · lanes · lines, and `MOST_MAPS` · `MAP_BYTES` of inputs.
    """
    e, wide = extents, extents.widest
    depths = _run(e)
    if backward:
        lines = max(e.scaled(PART_BYTES) // (NUMBER * e.cells * e.lanes), -(-LEAST_TERMS // e.depth_groups), 1)
        lines = _even(e.depths, min(lines, e.depths), LEAST_DEPTHS)
        kernels = min(e.scaled(SHARED_BYTES), e.limit) // (NUMBER * e.rows * e.lanes * lines)
        maps = MOST_MAPS * MAP_BYTES // (NUMBER * e.source_positions * e.lanes * e.lane_groups)
        return Blocking(depths, _between(1, min(kernels, maps), e.batch), e.batch, 1, lines=lines)
    held = min(e.scaled(PART_BYTES), e.limit // e.threads) // (NUMBER * e.rows * e.depths)
    lines = _between(wide, held // e.batch // wide * wide, -(-e.lanes // wide) * wide)
    blocks = -(-e.lanes // lines)
    shared = -(-blocks // e.threads) * e.threads
    lines = -(-e.lanes // (shared if e.lanes >= shared * wide else blocks) // wide) * wide
    parts = share(e._replace(lanes=-(-e.lanes // lines) * e.width, cell_groups=1))
    mixed = _between(1, held // lines, -(-e.batch // parts))
    panel = e.scaled(PANEL_BYTES) // (NUMBER * e.rows * mixed * wide)
    depths = _even(e.depths, _between(wide, min(depths, panel) // wide * wide, e.depths), wide)
    return Blocking(depths, mixed, e.batch, parts, lines=lines)


def block_bases(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes kernels from bases, forward or backward.

    depths = `depths_of_bases`; mixed as in `block_kernels`.
    """
    e = extents
    depths = depths_of_bases(e.rows * e.ranks, e.depths, e.scaled(BLOCK_BYTES) // e.width)
    sample = NUMBER * e.rows * (depths + 1) * e.width
    parts = share(e)
    found = Blocking(depths, _between(1, _kernel_bytes(e) // sample, e.batch), _read(e, parts), parts)
    return found if backward else _gathered(found, e, backward=False)


def depths_of_bases(bases: int, depths: int, bytes: int = BLOCK_BYTES // NARROW) -> int:
    """Return the depths of a block of bases: what `bytes`, for one lane, hold of the bases of all mixtures."""
    return _even(depths, _between(LEAST_BASES, bytes // (NUMBER * bases), depths), LEAST_BASES)


def block_inputs(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes inputs: a block is a whole cell, and a thread has cells of its own.

    mixed = what `KERNEL_BYTES` hold of rows · (channels + width), a sample's mixed inputs for one cell.
    read = what `MOST_MAPS` · `MAP_BYTES` hold of both maps, and of a sum in every thread of the one that is written.
    """
    e = extents
    channels, rows = e.depths, e.lane_groups * e.out_positions
    if backward:
        channels, rows = e.lanes, e.depth_groups * e.source_positions
    mixed = _between(1, e.scaled(KERNEL_BYTES) // (NUMBER * rows * (channels + e.width)), e.batch)
    source, out = e.source_positions * e.depths * e.depth_groups, e.out_positions * e.lanes * e.lane_groups
    held = NUMBER * (source + out * (1 + e.threads))
    read = _even(e.batch, _between(1, MOST_MAPS * MAP_BYTES // held, e.batch), 1)
    return Blocking(e.depths, _even(read, min(mixed, read), 1), read, 1)


def block_channels(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass of a depthwise convolution, forward or backward: blocks have one depth, and threads maps of their own.

    lines = lanes in whole blocks: what `BLOCK_BYTES` (backward a third of it, beside the transposed block and its
    gradients) hold of cells, and `KERNEL_BYTES` of rows. Threads share the blocks if they go evenly among them, **or**
    if there are too few strips to share instead.
    mixed = what `KERNEL_BYTES` hold of rows · (lines + width).
    """
    e, wide = extents, extents.width
    most = min(e.scaled(BLOCK_BYTES) // ((3 if backward else 1) * e.cells), _kernel_bytes(e) // e.rows) // NUMBER
    blocks = -(-e.lanes // _between(wide, most // wide * wide, e.lanes))
    shared, narrow = -(-blocks // e.threads) * e.threads, -(-e.lanes // wide)
    if _imbalance(narrow, shared) <= IMBALANCE or e.batch * e.strips < e.threads:
        blocks = min(shared, narrow)
    lines = -(-e.lanes // blocks // wide) * wide
    parts = share(e._replace(lanes=-(-e.lanes // lines) * wide))
    return Blocking(
        1, _between(1, _kernel_bytes(e) // (NUMBER * e.rows * (lines + wide)), e.batch), e.batch, parts, lines=lines
    )


def mixes_few(kernels: int, cells: int) -> bool:
    """Return whether so few kernels are mixed faster from unpacked cells than from packed ones."""
    return TURNING * kernels <= cells


def share(extents: Extents) -> int:
    """Return the fewest parts of the samples such that blocks of lanes · parts go evenly among the threads."""
    blocks = extents.cell_groups * -(-extents.lanes // extents.width)
    threads = extents.threads
    parts = next(n for n in range(1, threads + 1) if _imbalance(blocks * n, threads) <= IMBALANCE)
    return min(parts, extents.batch * extents.strips)


def _tile_depths(extents: Extents) -> int:
    """Return the depths that a tile of positions takes at a time, forward.

    They are what `TILE_BYTES` hold of depth groups · taps · width, in whole vectors.
    """
    e = extents
    most = e.scaled(TILE_BYTES) // (NUMBER * e.depth_groups * e.taps * e.width)
    return _even(e.depths, _between(e.widest, most // e.widest * e.widest, e.depths), e.widest)


def _run(extents: Extents) -> int:
    """Return how many numbers of all cells, in whole vectors, half of `BLOCK_BYTES` holds; the next take the rest."""
    e, wide = extents, extents.widest
    return _between(wide, e.scaled(BLOCK_BYTES) // 2 // (NUMBER * e.cells) // wide * wide, MOST_RUN)


def _kernel_bytes(extents: Extents) -> int:
    return min(extents.scaled(KERNEL_BYTES), extents.limit // extents.threads)


def _read(extents: Extents, parts: int) -> int:
    """Return the samples that are read together.

    They are what `MAP_BYTES` hold of source positions · channels; or more, up to `MOST_MAPS` times as many, so that
    packing the cells, which is done again for each such group of samples, is a few percent of the work:
    PACKING · cells / (rows · (cells + uses of a kernel)) samples. Bases are mixed again with them, rows · ranks
    multiply-adds per number of a cell; **or**, where they are kept, loaded from memory, `BRINGING` for each number.
    """
    e = extents
    held = NUMBER * e.source_positions * e.depths * e.depth_groups * e.groups * e.cell_groups
    once = BRINGING * e.rows * e.ranks if e.kept else (PACKING + e.rows * e.ranks) * e.cells
    packing = once // (e.rows * ((e.ranks or e.cells) + e.uses))
    samples = max(MAP_BYTES // held, min(packing, MOST_MAPS * MAP_BYTES // held))
    return _even(e.batch, _between(parts, samples, e.batch), parts)


def _imbalance(items: int, threads: int) -> float:
    return -(-items // threads) * threads / items


def _between(least: int, value: int, most: int) -> int:
    """Return the value, but at least `least`, and at most `most` whatever the least."""
    return max(min(value, most), min(least, most))


def _even(whole: int, most: int, multiple: int) -> int:
    """Return the size of equal pieces of `whole` of about `most`, a multiple of `multiple` and no more than all."""
    size = -(-whole // -(-whole // most))
    return min(-(-size // multiple) * multiple, whole)
