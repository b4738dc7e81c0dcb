"""Calls of the compiled passes: the structures that they take, the sizes of blocks, and the shares of threads."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.native.library import library
from kw_lightning.nn.engine.native.tables import Sums, Tables, find_tables
from kw_lightning.nn.engine.workspace import scratch, workspace_bytes
from kw_lightning.nn.partition import Shape

# By order of computation, forward and backward.
_FUNCTIONS = {
    "mix_kernels": ("kw_mix_kernels", "kw_mix_kernels"),
    "winograd": ("kw_mix_kernels", "kw_mix_kernels"),
    "mix_inputs": ("kw_mix_inputs", "kw_mix_inputs_backward"),
    "depthwise": ("kw_mix_depthwise", "kw_mix_depthwise"),
}
# Bytes of one block of all cells and of the kernels mixed from it together, which share the second-level cache, and of
# maps converted together, for the third level. Half and twice of each were alike on a processor with 0.5 and 8 MB.
BLOCK_BYTES = 160 * 1024
KERNEL_BYTES = 192 * 1024
MAP_BYTES = 4 * 2**20
# More maps are converted together, up to so many times the bytes, where packing the cells anew would cost more than a
# few hundredths of the work on them: packing a number takes as long as so many multiply-adds.
MOST_MAPS = 8
PACKING = 500
# Numbers in a line of the cache.
LINE = 16
# How much longer the busiest thread may take than all of them on average.
IMBALANCE = 1.1


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "channel", "position", "positions")),
    )


class _Sums(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("term", ctypes.c_void_p))


class _Pass(ctypes.Structure):
    """See pass.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "rows", "cells")),
        *((name, ctypes.c_int64) for name in ("lanes", "depths", "lane_groups", "depth_groups")),
        *((name, ctypes.c_int64) for name in ("row_tap", "row_lane", "row_depth")),
        *((name, ctypes.c_int64) for name in ("cell_step", "lane_step", "depth_step")),
        *((name, ctypes.c_int64) for name in ("out_positions", "source_positions")),
        *((name, _Map) for name in ("out", "source", "other")),
        *((name, _Sums) for name in ("out_sums", "source_sums", "other_sums")),
        *((name, ctypes.c_int64) for name in ("taps", "tiles", "spans")),
        *((name, ctypes.c_void_p) for name in ("tile_start", "tile", "reads", "span", "run")),
        *((name, ctypes.c_int64) for name in ("chunk", "group", "samples", "parts", "threads")),
        *((name, ctypes.c_void_p) for name in ("alpha", "cell", "alpha_gradient", "cell_gradient", "memory")),
    )


def available() -> bool:
    """Return whether the compiled passes can be called here."""
    return library() is not None


def forward(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, y: Tensor, order: str) -> None:
    """Write the convolution of every sample with its own kernel; all in single precision on a CPU.

    Args:
        x: [batch, in_channels, *size], channels first or last in memory, as all maps here.
        attention: α [batch, mixtures, cells], contiguous.
        cells: E [cells, co, ci, *ones], contiguous.
        y: [batch, out_channels, *output_size], overwritten.
        order: a key of `_FUNCTIONS`.
    """
    call = _Call(x, attention, cells, convolution, order, backward=False)
    call.map("source", x)
    call.map("out", y)
    call.run()


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    wanted: Gradients,
    order: str,
) -> None:
    """Write the gradients.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, order: as in `forward`.
        wanted: where the gradients go; `wanted.x` [batch, in_channels, *size].
    """
    call = _Call(x, attention, cells, convolution, order, backward=True)
    call.map("source", gradient)
    call.map("out", x if wanted.x is None else wanted.x, touch=wanted.x is not None)
    call.map("other", x, touch=wanted.of_kernels or order == "mix_inputs")
    call.run(wanted)


class _Call:
    """One call of a pass, and what has to stay alive until it returns."""

    def __init__(
        self, x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, order: str, *, backward: bool
    ) -> None:
        self.order, self.backward, self.cells = order, backward, cells
        limit = workspace_bytes(x.device)
        self.tables, template = _describe(
            convolution, tuple(x.shape[2:]), len(x), len(cells), order, backward, torch.get_num_threads(), limit
        )
        self.attention = self._taps_of(attention)
        self.arguments = _Pass.from_buffer_copy(template)
        self.arguments.alpha, self.arguments.cell = self.attention.data_ptr(), cells.data_ptr()

    def map(self, name: str, tensor: Tensor, *, touch: bool = True) -> None:
        """Tell the pass where one of its maps lies; only its size if it is not to be touched."""
        flat = tensor.view(*tensor.shape[:2], -1)
        setattr(self.arguments, name, _Map(flat.data_ptr() if touch else None, *flat.stride(), flat.shape[2]))

    def run(self, wanted: Gradients | None = None) -> None:
        """Call the pass, and hand out the gradients of α and E."""
        p = self.arguments
        attention_gradient = cells_gradient = None
        if wanted is not None and wanted.attention is not None:
            attention_gradient = self.cells.new_zeros(p.threads, p.batch, p.rows, _padded(p.cells))
            p.alpha_gradient = attention_gradient.data_ptr()
        if wanted is not None and wanted.cells is not None:
            # Where threads share a block of lanes, each of them has a gradient of its own.
            cells_gradient = wanted.cells if p.parts == 1 else self.cells.new_zeros(p.parts, *self.cells.shape)
            p.cell_gradient = cells_gradient.data_ptr()
        name = _FUNCTIONS[self.order][self.backward]
        memory = scratch("native", [getattr(_library(), name + "_memory")(ctypes.byref(p))], self.cells)
        p.memory = memory.data_ptr()
        getattr(_library(), name)(ctypes.byref(p))
        if wanted is not None and wanted.attention is not None and attention_gradient is not None:
            self._put_back(attention_gradient.sum(0)[..., : p.cells], wanted.attention)
        if wanted is not None and wanted.cells is not None and p.parts > 1 and cells_gradient is not None:
            torch.sum(cells_gradient, 0, out=wanted.cells)

    def _taps_of(self, attention: Tensor) -> Tensor:
        """Return α of the taps that the tables know, [batch, taps · groups, cells]."""
        tables = self.tables
        if tables.kernel_transform is None and len(tables.live) == tables.kernel_positions:
            return attention
        by_tap = attention.view(len(attention), tables.kernel_positions, -1)
        if tables.kernel_transform is not None:
            by_tap = torch.matmul(tables.kernel_transform, by_tap)
        else:
            by_tap = by_tap[:, list(tables.live)]
        return by_tap.reshape(len(attention), -1, attention.shape[2])

    def _put_back(self, gradient: Tensor, total: Tensor) -> None:
        """Add the gradient of `_taps_of(attention)` to that of α, `total` [batch, mixtures, cells]."""
        tables = self.tables
        place = total.view(len(total), tables.kernel_positions, -1)
        by_tap = gradient.reshape(len(total), -1, place.shape[2])
        if tables.kernel_transform is not None:
            place += torch.matmul(tables.kernel_transform.t(), by_tap)
        elif len(tables.live) == tables.kernel_positions:
            place += by_tap
        else:
            place[:, list(tables.live)] += by_tap


@functools.lru_cache(maxsize=1024)
def _describe(
    convolution: Convolution,
    size: Shape,
    batch: int,
    cells: int,
    order: str,
    backward: bool,
    threads: int,
    limit: int,
) -> tuple[Tables, Any]:
    """Return the tables of a pass, and what it is told but for the places of tensors.

    Args:
        size: of the convolution's input.
        cells: n.
        limit: bytes of the kernels that are mixed at once.
    """
    tables = find_tables(convolution, size, _library().kw_rows(), winograd=order == "winograd")
    direction = tables.backward if backward else tables.forward
    _, out_groups, in_groups = convolution.grid
    co, ci = convolution.cell_shape[:2]  # ci is 1 in depthwise convolutions: lanes are theirs, both ways
    p = _Pass(batch=batch, rows=len(tables.live) * out_groups * in_groups, cells=cells, threads=threads)
    p.cell_step, p.row_tap = co * ci, out_groups * in_groups
    if backward and order != "depthwise":
        p.lanes, p.depths, p.lane_groups, p.depth_groups = ci, co, in_groups, out_groups
        p.row_lane, p.row_depth, p.lane_step, p.depth_step = 1, in_groups, 1, ci
    else:
        p.lanes, p.depths, p.lane_groups, p.depth_groups = co, ci, out_groups, in_groups
        p.row_lane, p.row_depth, p.lane_step, p.depth_step = in_groups, 1, ci, 1
    p.source_positions, p.out_positions = tables.inputs, tables.outputs
    if backward:
        p.source_positions, p.out_positions = tables.outputs, tables.inputs
    p.taps, p.tiles, p.spans = len(tables.live), len(direction.tile_start), len(tables.span) // 4
    p.tile_start, p.tile = direction.tile_start.data_ptr(), direction.tile.data_ptr()
    p.reads, p.span, p.run = (table.data_ptr() for table in (tables.reads, tables.span, tables.run))
    p.source_sums, p.out_sums = _sums(direction.source_sums), _sums(direction.out_sums)
    p.other_sums = _sums(tables.forward.source_sums)
    _share_out(p, order, backward, limit)
    return tables, p


def _share_out(p: Any, order: str, backward: bool, limit: int) -> None:
    """Choose the sizes of blocks and the shares of threads."""
    lanes = _library().kw_lanes()
    wide = lanes // 16  # wider vectors come with larger caches
    blocks = -(-p.lanes // lanes)
    p.parts = next(n for n in range(1, p.threads + 1) if _imbalance(blocks * n, p.threads) <= IMBALANCE)
    p.parts = min(p.parts, p.batch)
    if order == "depthwise":
        p.chunk, p.samples = 1, p.batch
        p.group = _clamp(min(KERNEL_BYTES * wide, limit // p.threads) // (4 * p.rows * lanes), 1, p.batch)
        return
    if order == "mix_inputs" and backward:
        p.chunk = p.depths
        row = 2 * p.depth_groups * p.source_positions * (p.cells + 1) * lanes
        p.group = _clamp(KERNEL_BYTES * wide * 2 // (4 * row), 1, p.batch)
    else:
        block = BLOCK_BYTES * wide // (2 if backward else 1)
        most = block // (4 * p.cells * lanes)
        if backward:
            p.chunk = _even(p.depths, _clamp(most, 8, p.depths), 8)
        else:  # depths lie together in E: whole lines of the cache are read
            p.chunk = _even(p.depths, _clamp(most // LINE * LINE, LINE, p.depths), LINE)
        kernels = min(KERNEL_BYTES * wide, limit // p.threads)
        p.group = _clamp(kernels // (4 * p.rows * (p.chunk + 1) * lanes), 1, p.batch)
    sample = 4 * p.source_positions * p.depths * p.depth_groups
    if order == "mix_inputs" and not backward:
        sample += 4 * p.lane_groups * p.out_positions * (p.chunk * p.cells + lanes)
    packed = PACKING * p.cells // (p.rows * (p.cells + p.source_positions))
    samples = max(MAP_BYTES // sample, min(packed, MOST_MAPS * MAP_BYTES // sample))
    p.samples = _even(p.batch, _clamp(samples, p.parts, p.batch), p.parts)


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _padded(cells: int) -> int:
    lanes: int = _library().kw_lanes()
    return -(-cells // lanes) * lanes


def _sums(sums: Sums | None) -> Any:
    return _Sums() if sums is None else _Sums(sums.start.data_ptr(), sums.term.data_ptr())


def _imbalance(items: int, threads: int) -> float:
    return -(-items // threads) * threads / items


def _clamp(value: int, least: int, most: int) -> int:
    return max(min(value, most), min(least, most))


def _even(whole: int, most: int, multiple: int) -> int:
    """Return the size of equal pieces of `whole` of about `most`, a multiple of `multiple` and no more than all."""
    size = -(-whole // -(-whole // most))
    return min(-(-size // multiple) * multiple, whole)
