"""How the work of a compiled pass is cut so that what is used together stays in the cache; pass.h draws the loops.

A number is 4 bytes. A block is `width` lanes by `depths` depths of every cell; from it the kernels of `mixed` samples
are made, used and forgotten. All sizes come of the shapes and of the bounds here: nothing is measured at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

NUMBER = 4
"""Bytes of a number."""
BLOCK_BYTES = 160 * 1024
"""Of one block of all cells, which shares the second-level cache with the kernels that are mixed from it.

Half and twice of this and of the two below were alike on a processor with 0.5 MB of it and 8 MB of the third level."""
TILE_BYTES = 16 * 1024
"""Of a kernel that a tile of positions takes at a time, which stays in the first-level cache from tile to tile."""
KERNEL_BYTES = 192 * 1024
"""Of the kernels that are mixed from one block and exist at once."""
LINE_BYTES = 3 * 2**20
"""Of the kernels of lines that are mixed as cells lie and exist at once; the second or third level streams them."""
GATHERED_BYTES = 5 * 2**20
"""Of the kernels that are mixed of all blocks before they are used."""
PART_BYTES = 3 * 2**19
"""Of the parts of kernels, and of those of the cells, that are mixed as these lie and exist at once."""
LEAST_TERMS = 64
"""Lines of all groups that are added to the input's gradient at a time, below which moving its sums is much of it."""
SHARED_BYTES = 6 * 2**20
"""Of the parts of kernels that all threads share, in the third-level cache."""
MOST_RUN = 512
"""Numbers of a cell that are mixed at a time."""
OWN_LINES = 64
"""Lines of a block, of all groups, from which on it lays out the source for itself: that is then little work.

Not where the convolution strides, whose positions are picked one by one."""
LEAST_LINES = 6
"""Lines of a block, below which the products' registers stay empty."""
MAP_BYTES = 4 * 2**20
"""Of the maps that are read together, and stay in the third-level cache."""
MOST_MAPS = 8
"""Times `MAP_BYTES` that are read together where packing the cells anew would cost more than a few hundredths."""
PACKING = 500
"""Multiply-adds that take as long as packing a number of a cell."""
PACKED_AGAIN = 8
"""Times that kernels could move while their blocks are packed once more."""
BRINGING = 250
"""The same for bringing a number of a kept basis from the memory."""
TURNING = 5
"""Cells that are packed in the time in which a kernel is mixed of cells as they lie, and turned."""
TURNED = 4
"""Lanes that are turned together."""
PANEL_BYTES = 3 * 2**16
"""Of the columns of kernels that are mixed as cells lie, then turned: the second-level cache holds them so long."""
LINE = 16
"""Numbers in a line of the cache."""
NARROW = 16
"""Lanes of the narrowest vectors: processors with wider ones have larger caches."""
LEAST_DEPTHS = 8
"""Depths of a block backwards, below which its products are too short."""
LEAST_BASES = 4
"""Depths of a block of bases, which are many: below them the products' registers stay empty."""
IMBALANCE = 1.1
"""How much longer the busiest thread may take than all of them on average."""


class Extents(NamedTuple):
    """How much there is to cut, in the words of pass.h.

    Attributes:
        batch, rows, cells: samples, mixtures of a sample, n.
        groups, cell_groups: of the convolution itself, whose channels are side by side.
        lanes, depths, lane_groups, depth_groups: the channel axes of a cell, and the cells along them.
        source_positions, out_positions: that the pass reads and writes.
        threads: that share the work.
        width: lanes of a block.
        limit: bytes of kernels that may exist at once, in all threads.
        ranks: bases of a mixture, 0 where it is of the cells.
        vectors: of a block's lanes, 1 or 2.
        taps: through which a position reads.
        strips: of a sample, which threads may share.
        kept: the bases are kept, and need not be mixed.
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
        """Return the positions at which a number of a kernel is used."""
        taps = max(self.rows // (self.groups * self.lane_groups * self.depth_groups), 1)
        return min(self.source_positions, self.out_positions) * self.taps // taps

    def scaled(self, bytes: int) -> int:
        """Return the bytes of a cache's share on a processor with these vectors."""
        return bytes * (self.widest // NARROW)


@dataclass(frozen=True)
class Blocking:
    """How the work is cut.

    Attributes:
        depths: of a block of cells.
        mixed: samples whose kernels, of one block, exist at once in a thread.
        read: samples whose maps are read together.
        parts: into which the samples are cut, so that threads have like shares.
        direct: kernels are mixed of the cells as they lie, and `depths` are theirs.
        tile: depths that a tile takes at a time, 0 for those of the block.
        lines: of a cell, whose kernels exist at once where cells are mixed line by line.
        gathers: kernels are mixed of all blocks before they are used.
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

    depths = what of `BLOCK_BYTES` (half of it backwards, where the block stands turned beside it) holds
    cells · width numbers a depth: forward whole lines of the cache, since depths lie together in E.
    mixed = what of `KERNEL_BYTES` holds rows · (depths + 1) · width numbers a sample.
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
    """Have the kernels of all blocks mixed before they are used, where that moves fewer numbers.

    Else a sample's outputs, out positions · width numbers, are read and written again with every block but the first;
    here its kernels are, once, rows · depths · width; `PACKED_AGAIN` times that backwards, where blocks are packed once
    more for the gradients. All samples that are read have theirs at once, in `GATHERED_BYTES`; where bases are kept, no
    more are read.
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
    """Cut a forward pass that mixes few kernels of cells as they lie; None where packing them is no more work.

    The kernels of all samples exist at once, as many depths of them as `KERNEL_BYTES` holds of rows · (width + TURNED)
    numbers a sample: cells are then read once, along their lines.
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
    """Cut a pass that mixes kernels line by line, as cells lie.

    depths = what of `BLOCK_BYTES` holds cells numbers a depth, in whole vectors. lines = what of `LINE_BYTES` holds
    rows · depths of a cell numbers a line of a sample, at least `LEAST_LINES`: in blocks that go evenly among the
    threads where those are so large, else in parts of the samples. mixed = what of `LINE_BYTES` holds such lines.
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
    """Cut its gradients, for which the kernels of some samples exist whole.

    depths = `_run`, of numbers; mixed = what `SHARED_BYTES` holds of kernels, rows · lanes · depths numbers a sample;
    read = what `MAP_BYTES` holds of both maps, which are read twice.
    """
    e = extents
    kernels = min(e.scaled(SHARED_BYTES), e.limit) // (NUMBER * e.rows * e.lanes * e.depths)
    maps = NUMBER * e.source_positions * (e.lanes * e.lane_groups + e.depths * e.depth_groups)
    mixed = _between(1, kernels, e.batch)
    return Blocking(_run(e), mixed, _between(1, MAP_BYTES // maps, mixed), 1)


def block_rows(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes kernels as cells lie, between maps whose channels are last.

    depths = what half of `BLOCK_BYTES` holds cells numbers each, of a run of all cells: the other half is for the next
    run. Forward, a thread's lines are those of which `PART_BYTES` holds the batch's kernels, rows · depths numbers a
    line and sample; mixed = what it holds of them; and a run is no more columns than `PANEL_BYTES` holds of their rows,
    of a vector's lines. Backward, lines are those of all threads: of which `PART_BYTES` holds the cells, cells · lanes
    numbers each, and no less than `LEAST_TERMS` of all groups; mixed = what `SHARED_BYTES` holds of their kernels, and
    `MOST_MAPS` · `MAP_BYTES` of inputs.
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
    """Cut a pass that mixes kernels of bases, either way.

    depths = `depths_of_bases`; mixed as in `block_kernels`.
    """
    e = extents
    depths = depths_of_bases(e.rows * e.ranks, e.depths, e.scaled(BLOCK_BYTES) // e.width)
    sample = NUMBER * e.rows * (depths + 1) * e.width
    parts = share(e)
    found = Blocking(depths, _between(1, _kernel_bytes(e) // sample, e.batch), _read(e, parts), parts)
    return found if backward else _gathered(found, e, backward=False)


def depths_of_bases(bases: int, depths: int, bytes: int = BLOCK_BYTES // NARROW) -> int:
    """Return the depths of a block of bases: what the bytes of a lane hold of the bases of all mixtures."""
    return _even(depths, _between(LEAST_BASES, bytes // (NUMBER * bases), depths), LEAST_BASES)


def block_inputs(extents: Extents, *, backward: bool) -> Blocking:
    """Cut a pass that mixes inputs: a block is a whole cell, and a thread has cells of its own.

    mixed = what of `KERNEL_BYTES` holds a sample's mixed inputs of one cell, rows · (channels + width) numbers.
    read = what of `MOST_MAPS` · `MAP_BYTES` holds both maps, and of the one that is written a sum in every thread.
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
    """Cut a pass of a depthwise convolution, either way: a block has one depth, and a thread reads its own maps.

    lines = lanes of which `BLOCK_BYTES` (a third of it backwards, where they stand turned beside it, and their
    gradients) holds cells numbers each, and `KERNEL_BYTES` rows numbers each, in whole blocks. Those are shared among
    the threads where they go evenly, **or** there are too few strips to share instead. mixed = what of `KERNEL_BYTES`
    holds rows · (lines + width) numbers a sample.
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
    """Return whether so few kernels are mixed sooner of the cells as they lie than of packed ones."""
    return TURNING * kernels <= cells


def share(extents: Extents) -> int:
    """Return the fewest parts of the samples with which blocks of lanes · parts go evenly among the threads."""
    blocks = extents.cell_groups * -(-extents.lanes // extents.width)
    threads = extents.threads
    parts = next(n for n in range(1, threads + 1) if _imbalance(blocks * n, threads) <= IMBALANCE)
    return min(parts, extents.batch * extents.strips)


def _tile_depths(extents: Extents) -> int:
    """Return the depths that a tile of positions takes at a time, forward.

    As many as `TILE_BYTES` hold of depth groups · taps · width numbers, in whole vectors.
    """
    e = extents
    most = e.scaled(TILE_BYTES) // (NUMBER * e.depth_groups * e.taps * e.width)
    return _even(e.depths, _between(e.widest, most // e.widest * e.widest, e.depths), e.widest)


def _run(extents: Extents) -> int:
    """Return the numbers of a run of all cells, in whole vectors, of which half of `BLOCK_BYTES` holds one."""
    e, wide = extents, extents.widest
    return _between(wide, e.scaled(BLOCK_BYTES) // 2 // (NUMBER * e.cells) // wide * wide, MOST_RUN)


def _kernel_bytes(extents: Extents) -> int:
    return min(extents.scaled(KERNEL_BYTES), extents.limit // extents.threads)


def _read(extents: Extents, parts: int) -> int:
    """Return the samples that are read together.

    As many as `MAP_BYTES` hold of source positions · channels numbers each; more, up to `MOST_MAPS` times as many, so
    that packing the cells, which is done anew for them, is a few hundredths of the work: PACKING · cells / (rows ·
    (cells + uses of a kernel)) samples. Bases are mixed anew with them, rows · ranks a cell; **or**, where they are
    kept, brought from the memory, `BRINGING` each.
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
