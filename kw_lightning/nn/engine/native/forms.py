"""The compiled passes, and the arguments of each for a problem: numbers and tables, but no tensor's address."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.blocking import (
    NUMBER,
    Blocking,
    Extents,
    block_bases,
    block_channels,
    block_inputs,
    block_kernels,
    block_lines,
    block_rows,
)
from kw_lightning.nn.engine.native.layout import Pass
from kw_lightning.nn.engine.native.library import library
from kw_lightning.nn.engine.native.positions import Positions, Reads, Windows, find_positions
from kw_lightning.nn.engine.native.walks import STRIP_BYTES, Walks, find_walks
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.partition import Shape


@dataclass(frozen=True, eq=False)  # compared by identity, which is fast: it is looked up at every call
class Form:
    """One of the compiled passes.

    Attributes:
        functions: of the library, forward and backward.
        block: how its work is cut.
        winograd: it computes between transformed maps.
        walks: it computes every channel by itself, along lines; for the others the lanes are input channels backward.
        narrows: its blocks may have one vector, where cells have few lanes.
        rereads: backward it needs the input for every gradient, not only for those of α and E.
    """

    functions: tuple[str, str]
    block: Callable[..., Blocking]
    winograd: bool = False
    walks: bool = False
    narrows: bool = False
    rereads: bool = False


MIX_KERNELS = Form(("kw_mix_kernels", "kw_mix_kernels"), block_kernels, narrows=True)
MIX_LINES = replace(MIX_KERNELS, functions=("kw_mix_lines", "kw_mix_lines_backward"), block=block_lines)
MIX_ROWS = replace(MIX_KERNELS, functions=("kw_mix_rows", "kw_mix_rows_backward"), block=block_rows)
MIX_BASES = replace(MIX_KERNELS, block=block_bases)
WINOGRAD = replace(MIX_KERNELS, winograd=True)
WINOGRAD_BASES = replace(MIX_BASES, winograd=True)
MIX_INPUTS = Form(("kw_mix_inputs", "kw_mix_inputs_backward"), block_inputs, rereads=True)
DEPTHWISE = Form(("kw_mix_depthwise", "kw_mix_depthwise"), block_channels, walks=True)


def lanes() -> int:
    """Return the lanes of two vectors."""
    found: int = opened().kw_lanes()
    return found


def opened() -> ctypes.CDLL:
    """Return the library; passes are chosen only if there is one."""
    loaded = library()
    assert loaded is not None
    return loaded


def live(convolution: Convolution, size: Shape, form: Form) -> Shape:
    """Return the kernel positions that a pass mixes: those that read anything, and all for Winograd's form."""
    if form.winograd:
        return tuple(range(math.prod(convolution.kernel_shape[2:])))
    return find_taps(convolution, size).live


@functools.lru_cache(maxsize=1024)
def describe(
    convolution: Convolution,
    size: Shape,
    batch: int,
    cells: int,
    ranks: int,
    form: Form,
    backward: bool,
    threads: int,
    limit: int,
    kept: bool = False,
) -> tuple[Reads, Pass]:
    """Return which position of a pass reads which, and its arguments without the addresses of tensors.

    Args:
        size: of the convolution's input.
        cells: n.
        ranks: bases of a mixture, 0 if kernels are mixed from cells.
        limit: bytes of the kernels that may exist at once.
        kept: the bases are kept.
    """
    p = Pass(batch=batch, cells=cells, ranks=ranks, threads=threads, groups=1, cell_groups=1)
    _, out_groups, in_groups = convolution.grid
    co, ci = convolution.cell_shape[:2]  # ci is 1 in depthwise convolutions: lanes are theirs, both ways
    p.cell_step, p.row_tap = co * ci, out_groups * in_groups
    if convolution.groups > 1 and not form.walks:
        p.cell_groups = max(co * convolution.groups // convolution.kernel_shape[0], 1)
        p.groups = convolution.groups // p.cell_groups
        co, out_groups = co // p.cell_groups, out_groups // p.groups
        p.group_step, p.row_group = co * ci, out_groups * in_groups
    if backward and not form.walks:
        p.lanes, p.depths, p.lane_groups, p.depth_groups = ci, co, in_groups, out_groups
        p.row_lane, p.row_depth, p.lane_step, p.depth_step = 1, in_groups, 1, ci
    else:
        p.lanes, p.depths, p.lane_groups, p.depth_groups = co, ci, out_groups, in_groups
        p.row_lane, p.row_depth, p.lane_step, p.depth_step = in_groups, 1, ci, 1
    p.vectors = 1 if form.narrows and p.lanes <= lanes() // 2 else 2
    tell = _tell_walks if form.walks else _tell_positions
    reads = tell(p, convolution, size, form, backward)
    p.taps, p.rows = reads.taps, len(reads.live) * p.row_tap
    p.source_positions, p.out_positions = reads.inputs, reads.outputs
    if backward:
        p.source_positions, p.out_positions = reads.outputs, reads.inputs
    blocking = form.block(_extents(p, limit, form)._replace(kept=kept), backward=backward)
    p.block_depths, p.mixed_samples, p.direct = blocking.depths, blocking.mixed, blocking.direct
    p.kernel_depths = p.depths if blocking.gathers else blocking.depths
    p.tile_depths, p.read_samples, p.parts = blocking.tile or blocking.depths, blocking.read, blocking.parts
    p.lines = blocking.lines
    return reads, p


def _tell_positions(p: Pass, convolution: Convolution, size: Shape, form: Form, backward: bool) -> Positions:
    positions = find_positions(convolution, size, opened().kw_rows(p.vectors), winograd=form.winograd)
    direction = positions.backward if backward else positions.forward
    p.tiles, p.spans = len(direction.tile_start), len(positions.span) // 4
    p.tile_start, p.tile = direction.tile_start.data_ptr(), direction.tile.data_ptr()
    p.reads, p.span, p.run = (table.data_ptr() for table in (positions.reads, positions.span, positions.run))
    p.source_windows, p.out_windows = _told(direction.source), _told(direction.out)
    p.other_windows = _told(positions.forward.source)
    return positions


def _tell_walks(p: Pass, convolution: Convolution, size: Shape, form: Form, backward: bool) -> Walks:
    walks = find_walks(convolution, size, STRIP_BYTES // (NUMBER * lanes()))
    p.walk, p.kernel_walk = (walks.backward if backward else walks.forward).told(), walks.forward.told()
    return walks


def _extents(p: Pass, limit: int, form: Form) -> Extents:
    told = {
        name: getattr(p, name) for name in Extents._fields if name not in ("width", "limit", "taps", "strips", "kept")
    }
    taps = 1 if form.winograd else p.taps
    strips = min(-(-walk.lines // walk.strip) for walk in (p.walk, p.kernel_walk)) if form.walks else 1
    return Extents(**told, width=lanes() * p.vectors // 2, limit=limit, taps=taps, strips=strips)


def _told(windows: Windows | None) -> layout.Windows:
    return layout.Windows() if windows is None else windows.told()
