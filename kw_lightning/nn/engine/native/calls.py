"""Calls of the compiled passes: what they are told, and the gradients that they hand back."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import ACTIVATIONS, Epilogue
from kw_lightning.nn.engine.gradients import Gradients
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
from kw_lightning.nn.engine.native.layout import Map, Pass
from kw_lightning.nn.engine.native.library import library
from kw_lightning.nn.engine.native.positions import Positions, Reads, Sums, find_positions
from kw_lightning.nn.engine.native.walks import STRIP_BYTES, Walks, find_walks
from kw_lightning.nn.engine.workspace import scratch, workspace_bytes
from kw_lightning.nn.partition import Shape


@dataclass(frozen=True, eq=False)  # one of those below, by identity: it is looked up at every call
class Form:
    """One of the compiled passes.

    Attributes:
        functions: of the library, forward and backward.
        block: how its work is cut.
        winograd: it computes between transformed maps.
        walks: every channel by itself, along lines; else, backwards, the lanes are input channels.
        narrows: its blocks may be of one vector, where cells have few lanes.
        rereads: backwards it needs the input for every gradient, not for those of α and E alone.
    """

    functions: tuple[str, str]
    block: Callable[..., Blocking]
    winograd: bool = False
    walks: bool = False
    narrows: bool = False
    rereads: bool = False


MIX_KERNELS = Form(("kw_mix_kernels", "kw_mix_kernels"), block_kernels, narrows=True)
MIX_LINES = replace(MIX_KERNELS, functions=("kw_mix_lines", "kw_mix_kernels"), block=block_lines)
MIX_ROWS = replace(MIX_KERNELS, functions=("kw_mix_rows", "kw_mix_rows_backward"), block=block_rows)
MIX_BASES = replace(MIX_KERNELS, block=block_bases)
WINOGRAD = replace(MIX_KERNELS, winograd=True)
MIX_INPUTS = Form(("kw_mix_inputs", "kw_mix_inputs_backward"), block_inputs, rereads=True)
DEPTHWISE = Form(("kw_mix_depthwise", "kw_mix_depthwise"), block_channels, walks=True)


def lanes() -> int:
    """Return the lanes of two vectors."""
    found: int = _library().kw_lanes()
    return found


def available() -> bool:
    """Return whether the compiled passes can be called here."""
    return library() is not None


def forward(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    form: Form,
    epilogue: Epilogue | None = None,
) -> None:
    """Write the convolution of every sample with its own kernel; all in single precision on a CPU.

    Args:
        x: [batch, in_channels, *size], channels first or last in memory, as all maps here.
        attention: α [batch, mixtures, cells], contiguous.
        cells: E [cells, co, ci, *ones], contiguous.
        y: [batch, out_channels, *output_size], overwritten.
        form: the pass.
        epilogue: what becomes of y; one that fits it.
    """
    prepare(x, attention, cells, convolution, y, form, epilogue).run()


def prepare(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    form: Form,
    epilogue: Epilogue | None = None,
) -> Call:
    """Return the call of `forward`, told all that it needs."""
    call = Call(x, attention, cells, convolution, form, backward=False)
    call.map("source", x)
    call.map("out", y)
    call.finish(epilogue)
    return call


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    wanted: Gradients,
    form: Form,
) -> None:
    """Write the gradients.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, form: as in `forward`.
        wanted: where the gradients go; `wanted.x` [batch, in_channels, *size].
    """
    call = Call(x, attention, cells, convolution, form, backward=True)
    call.map("source", gradient)
    call.map("out", x if wanted.x is None else wanted.x, touch=wanted.x is not None)
    call.map("other", x, touch=wanted.of_kernels or form.rereads)
    call.run(wanted)


def forward_by_bases(
    x: Tensor,
    weights: Tensor,
    bases: Tensor,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    kept: Kept | None,
    epilogue: Epilogue | None = None,
) -> None:
    """Write the convolution of every sample with its own kernel, mixed of few bases a mixture.

    Args:
        weights: of the bases, [batch, mixtures, ranks], contiguous.
        bases: by cells, [mixtures, ranks, cells], contiguous.
        x, cells, y, epilogue: as in `forward`.
        kept: memory for the mixed bases, which this pass fills where none did; None where they are not to be kept.
    """
    call = Call(x, weights, cells, convolution, MIX_BASES, backward=False, bases=bases, kept=kept)
    call.map("source", x)
    call.map("out", y)
    call.finish(epilogue)
    call.run()


def backward_by_bases(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    bases: Tensor,
    cells: Tensor,
    convolution: Convolution,
    wanted: Gradients,
) -> Tensor | None:
    """Write the gradients of (x, weights, cells), and return that of the bases where that of the weights is wanted.

    Args:
        gradient, wanted: as in `backward`.
        x, weights, bases, cells: as in `forward_by_bases`.
    """
    call = Call(x, weights, cells, convolution, MIX_BASES, backward=True, bases=bases)
    call.map("source", gradient)
    call.map("out", x if wanted.x is None else wanted.x, touch=wanted.x is not None)
    call.map("other", x, touch=wanted.of_kernels)
    return call.run(wanted)


class Kept:
    """Memory for a layer's mixed bases, as blocks that the pass streams.

    Attributes:
        blocks: flat; None until a pass has filled it.
    """

    blocks: Tensor | None = None


class Call:
    """One call of a pass, and what has to stay alive until it returns."""

    def __init__(
        self,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        convolution: Convolution,
        form: Form,
        *,
        backward: bool,
        bases: Tensor | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.function, self.cells = form.functions[backward], cells
        limit, ranks = workspace_bytes(x.device), 0 if bases is None else bases.shape[1]
        size, threads = tuple(x.shape[2:]), torch.get_num_threads()
        self.positions, template = _describe(
            convolution, size, len(x), len(cells), ranks, form, backward, threads, limit
        )
        self.attention = self._taps_of(attention)
        p = self.arguments = Pass.from_buffer_copy(template)
        p.alpha, p.cell = self.attention.data_ptr(), cells.data_ptr()
        if bases is not None:
            self.bases = self._taps_of(bases.flatten(1).unsqueeze(0)).view(p.rows, ranks, len(cells))
            p.base = self.bases.data_ptr()
        self.kept = kept
        if kept is not None:
            self.blocks = self._find_blocks(kept)
            p.kept = self.blocks.data_ptr()

    def _find_blocks(self, kept: Kept) -> Tensor:
        """Return the blocks of mixed bases, or memory for them, and tell the pass which."""
        p, blocks = self.arguments, kept.blocks
        lanes = p.cell_groups * _padded(p.lanes)  # no fewer than those of the blocks
        numbers = lanes * -(-p.depths // p.block_depths) * p.block_depths * p.rows * p.ranks
        p.kept_filled = blocks is not None and blocks.numel() == numbers
        if blocks is not None and p.kept_filled:
            return blocks
        with torch.inference_mode(False):  # it outlives the call
            return torch.empty(numbers, dtype=self.cells.dtype, device="cpu")

    def map(self, name: str, tensor: Tensor, *, touch: bool = True) -> None:
        """Tell the pass where one of its maps lies; only its size if it is not to be touched."""
        setattr(self.arguments, name, map_of(tensor, touch=touch))

    def finish(self, epilogue: Epilogue | None) -> None:
        """Tell the pass what becomes of its output."""
        if epilogue is None:
            return
        factors = [None if factor is None else factor.data_ptr() for factor in epilogue.factors]
        added = Map() if epilogue.added is None else map_of(epilogue.added)
        epsilon = 0.0 if epilogue.norm is None else epilogue.norm.epsilon
        activation = 0 if epilogue.activation is None else 1 + list(ACTIVATIONS).index(epilogue.activation)
        self.arguments.epilogue = layout.Epilogue(*factors, added, epsilon, activation, True)

    def run(self, wanted: Gradients | None = None) -> Tensor | None:
        """Call the pass, and hand out the gradients of α and E; return that of the bases."""
        p = self.arguments
        attention_gradient = cells_gradient = None
        terms = p.ranks or p.cells
        numbers = p.batch * p.rows * _padded(terms)
        if wanted is not None and wanted.attention is not None and self._fits(wanted.attention, terms):
            p.alpha_gradient = wanted.attention.data_ptr()
        elif wanted is not None and wanted.attention is not None:
            of_bases = p.rows * p.ranks * _padded(p.cells)
            attention_gradient = self.cells.new_zeros(p.threads, numbers + of_bases)
            p.alpha_gradient = attention_gradient.data_ptr()
        if wanted is not None and wanted.cells is not None:
            # Where threads share a block of lanes, each of them has a gradient of its own.
            cells_gradient = wanted.cells if p.parts == 1 else self.cells.new_zeros(p.parts, *self.cells.shape)
            p.cell_gradient = cells_gradient.data_ptr()
            p.adds = wanted.adds
        loaded = _library()
        memory = scratch("native", [getattr(loaded, self.function + "_memory")(ctypes.byref(p))], self.cells)
        p.memory = memory.data_ptr()
        getattr(loaded, self.function)(ctypes.byref(p))
        if self.kept is not None:
            self.kept.blocks = self.blocks
        if wanted is not None and wanted.cells is not None and p.parts > 1 and cells_gradient is not None:
            if wanted.adds:
                wanted.cells.add_(cells_gradient.sum(0))
            else:
                torch.sum(cells_gradient, 0, out=wanted.cells)
        if wanted is None or wanted.attention is None or attention_gradient is None:
            return None
        found = attention_gradient[0] if p.threads == 1 else attention_gradient.sum(0)
        self._put_back(found[:numbers].view(p.batch, p.rows, -1)[..., :terms], wanted.attention)
        return self._put_back_bases(found[numbers:]) if p.ranks else None

    def _fits(self, total: Tensor, terms: int) -> bool:
        """Return whether the pass may add to the gradient of α itself: one thread does, and to numbers as they lie."""
        p = self.arguments
        as_told = p.rows == total.shape[1] and self.positions.kernel_transform is None
        return p.threads == 1 and p.ranks == 0 and as_told and _padded(terms) == terms and total.is_contiguous()

    def _put_back_bases(self, gradient: Tensor) -> Tensor:
        """Return the gradient of all mixtures' bases, [mixtures, ranks, cells], from that of `base`."""
        p, positions = self.arguments, self.positions
        mixtures = p.rows // len(positions.live) * positions.kernel_positions
        total = self.cells.new_zeros(1, mixtures, p.ranks * p.cells)
        self._put_back(gradient.view(1, p.rows, p.ranks, -1)[..., : p.cells].flatten(2), total)
        return total.view(-1, p.ranks, p.cells)

    def _taps_of(self, attention: Tensor) -> Tensor:
        """Return α of the taps that read anything, [batch, taps · groups, cells]."""
        positions = self.positions
        if positions.kernel_transform is None and len(positions.live) == positions.kernel_positions:
            return attention
        by_tap = attention.view(len(attention), positions.kernel_positions, -1)
        if positions.kernel_transform is not None:
            by_tap = torch.matmul(positions.kernel_transform, by_tap)
        else:
            by_tap = by_tap[:, list(positions.live)]
        return by_tap.reshape(len(attention), -1, attention.shape[2])

    def _put_back(self, gradient: Tensor, total: Tensor) -> None:
        """Add the gradient of `_taps_of(attention)` to that of α, `total` [batch, mixtures, cells]."""
        positions = self.positions
        place = total.view(len(total), positions.kernel_positions, -1)
        by_tap = gradient.reshape(len(total), -1, place.shape[2])
        if positions.kernel_transform is not None:
            place += torch.matmul(positions.kernel_transform.t(), by_tap)
        elif len(positions.live) == positions.kernel_positions:
            place += by_tap
        else:
            place[:, list(positions.live)] += by_tap


@functools.lru_cache(maxsize=1024)
def _describe(
    convolution: Convolution,
    size: Shape,
    batch: int,
    cells: int,
    ranks: int,
    form: Form,
    backward: bool,
    threads: int,
    limit: int,
) -> tuple[Reads, Pass]:
    """Return which position of a pass reads which, and what it is told but for the places of tensors.

    Args:
        size: of the convolution's input.
        cells: n.
        ranks: bases of a mixture, 0 where it is of the cells.
        limit: bytes of the kernels that are mixed at once.
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
    p.taps, p.rows = len(reads.live), len(reads.live) * p.row_tap
    p.source_positions, p.out_positions = reads.inputs, reads.outputs
    if backward:
        p.source_positions, p.out_positions = reads.outputs, reads.inputs
    blocking = form.block(_extents(p, limit, form), backward=backward)
    p.block_depths, p.mixed_samples, p.direct = blocking.depths, blocking.mixed, blocking.direct
    p.tile_depths, p.read_samples, p.parts = blocking.tile or blocking.depths, blocking.read, blocking.parts
    p.lines = blocking.lines
    return reads, p


def _tell_positions(p: Pass, convolution: Convolution, size: Shape, form: Form, backward: bool) -> Positions:
    positions = find_positions(convolution, size, _library().kw_rows(p.vectors), winograd=form.winograd)
    direction = positions.backward if backward else positions.forward
    p.tiles, p.spans = len(direction.tile_start), len(positions.span) // 4
    p.tile_start, p.tile = direction.tile_start.data_ptr(), direction.tile.data_ptr()
    p.reads, p.span, p.run = (table.data_ptr() for table in (positions.reads, positions.span, positions.run))
    p.source_sums, p.out_sums = _sums(direction.source_sums), _sums(direction.out_sums)
    p.other_sums = _sums(positions.forward.source_sums)
    return positions


def _tell_walks(p: Pass, convolution: Convolution, size: Shape, form: Form, backward: bool) -> Walks:
    walks = find_walks(convolution, size, STRIP_BYTES // (NUMBER * lanes()))
    p.walk, p.kernel_walk = (walks.backward if backward else walks.forward).told(), walks.forward.told()
    return walks


def _extents(p: Pass, limit: int, form: Form) -> Extents:
    told = {name: getattr(p, name) for name in Extents._fields if name not in ("width", "limit", "taps", "strips")}
    taps = 1 if form.winograd else p.taps
    strips = min(-(-walk.lines // walk.strip) for walk in (p.walk, p.kernel_walk)) if form.walks else 1
    return Extents(**told, width=lanes() * p.vectors // 2, limit=limit, taps=taps, strips=strips)


def map_of(tensor: Tensor, *, touch: bool = True) -> Map:
    """Return where a map [batch, channels, *size] lies, channels first or last."""
    flat = tensor.view(*tensor.shape[:2], -1)
    return Map(flat.data_ptr() if touch else None, *flat.stride(), flat.shape[2])


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _padded(cells: int) -> int:
    return -(-cells // lanes()) * lanes()


def _sums(sums: Sums | None) -> layout.Sums:
    return layout.Sums() if sums is None else layout.Sums(sums.start.data_ptr(), sums.term.data_ptr())
