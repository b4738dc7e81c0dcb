"""Calls of the compiled passes: their arguments, and the gradients that they return."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import ACTIVATIONS, Epilogue
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.forms import Form, describe, lanes, opened
from kw_lightning.nn.engine.native.layout import Map, Pass
from kw_lightning.nn.engine.native.library import library
from kw_lightning.nn.engine.workspace import scratch, workspace_bytes


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
        epilogue: of y; one that fits it.
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
    """Return the call of `forward`, with all of its arguments."""
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
    call = prepare_backward(gradient, x, attention, cells, convolution, form)
    call.map("out", x if wanted.x is None else wanted.x, touch=wanted.x is not None)
    call.map("other", x, touch=wanted.of_kernels or form.rereads)
    call.run(wanted)


def prepare_backward(
    gradient: Tensor, x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, form: Form
) -> Call:
    """Return the call of `backward`, without the addresses of what it writes; the gradient of x is laid out as x."""
    call = Call(x, attention, cells, convolution, form, backward=True)
    call.map("source", gradient)
    call.map("out", x)
    call.map("other", x)
    return call


def forward_by_bases(
    x: Tensor,
    weights: Tensor,
    bases: Tensor,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    form: Form,
    kept: Kept | None,
    epilogue: Epilogue | None = None,
) -> None:
    """Write the convolution of every sample with its own kernel, mixed from a few bases per mixture.

    Args:
        weights: of the bases, [batch, mixtures, ranks], contiguous.
        bases: by cells, [mixtures, ranks, cells], contiguous.
        x, cells, y, form, epilogue: as in `forward`.
        kept: memory for the mixed bases, which the first pass fills; None to keep none.
    """
    call = Call(x, weights, cells, convolution, form, backward=False, bases=bases, kept=kept)
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
    form: Form,
) -> Tensor | None:
    """Write the gradients of (x, weights, cells), and return that of the bases where that of the weights is wanted.

    Args:
        gradient, wanted: as in `backward`.
        x, weights, bases, cells, form: as in `forward_by_bases`.
    """
    call = Call(x, weights, cells, convolution, form, backward=True, bases=bases)
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
        self.positions, template = describe(
            convolution, size, len(x), len(cells), ranks, form, backward, threads, limit, kept is not None
        )
        self.attention = self._live(attention)
        p = self.arguments = Pass.from_buffer_copy(template)
        p.alpha, p.cell = self.attention.data_ptr(), cells.data_ptr()
        if bases is not None:
            self.bases = self._live(bases.flatten(1).unsqueeze(0)).view(p.rows, ranks, len(cells))
            p.base = self.bases.data_ptr()
        self.kept = kept
        if kept is not None:
            self.blocks = self._find_blocks(kept)
            p.kept = self.blocks.data_ptr()

    def _find_blocks(self, kept: Kept) -> Tensor:
        """Return the blocks of mixed bases, or memory for them, and tell the pass whether they are filled."""
        p, blocks = self.arguments, kept.blocks
        lanes = p.cell_groups * _padded(p.lanes)  # no fewer than those of the blocks
        numbers = lanes * -(-p.depths // p.block_depths) * p.block_depths * p.rows * p.ranks
        p.kept_filled = blocks is not None and blocks.numel() == numbers
        if blocks is not None and p.kept_filled:
            return blocks
        with torch.inference_mode(False):  # it outlives the call
            return torch.empty(numbers, dtype=self.cells.dtype, device="cpu")

    def map(self, name: str, tensor: Tensor, *, touch: bool = True) -> None:
        """Tell the pass the address and layout of one of its maps; only the layout if it must not touch it."""
        setattr(self.arguments, name, map_of(tensor, touch=touch))

    def finish(self, epilogue: Epilogue | None) -> None:
        """Tell the pass the epilogue of its output."""
        if epilogue is None:
            return
        factors = [None if factor is None else factor.data_ptr() for factor in epilogue.factors]
        added = Map() if epilogue.added is None else map_of(epilogue.added)
        epsilon = 0.0 if epilogue.norm is None else epilogue.norm.epsilon
        activation = 0 if epilogue.activation is None else 1 + list(ACTIVATIONS).index(epilogue.activation)
        self.arguments.epilogue = layout.Epilogue(*factors, added, epsilon, activation, True)

    def run(self, wanted: Gradients | None = None) -> Tensor | None:
        """Call the pass, and put the gradients of α and E into `wanted`; return that of the bases."""
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
        loaded = opened()
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
        """Return whether the pass may add to the gradient of α itself: one thread, all positions live, no padding."""
        p = self.arguments
        as_told = p.rows == total.shape[1] and p.ranks == 0
        return p.threads == 1 and as_told and _padded(terms) == terms and total.is_contiguous()

    def _put_back_bases(self, gradient: Tensor) -> Tensor:
        """Return the gradient of all mixtures' bases, [mixtures, ranks, cells], from that of `base`."""
        p, positions = self.arguments, self.positions
        mixtures = p.rows // len(positions.live) * positions.kernel_positions
        total = self.cells.new_zeros(1, mixtures, p.ranks * p.cells)
        self._put_back(gradient.view(1, p.rows, p.ranks, -1)[..., : p.cells].flatten(2), total)
        return total.view(-1, p.ranks, p.cells)

    def _live(self, attention: Tensor) -> Tensor:
        """Return α of the taps that read anything, [batch, taps · groups, cells]."""
        positions = self.positions
        if len(positions.live) == positions.kernel_positions:
            return attention
        by_position = attention.view(len(attention), positions.kernel_positions, -1)
        return by_position[:, list(positions.live)].reshape(len(attention), -1, attention.shape[2])

    def _put_back(self, gradient: Tensor, total: Tensor) -> None:
        """Add the gradient of `_live(attention)` to that of α, `total` [batch, mixtures, cells]."""
        positions = self.positions
        place = total.view(len(total), positions.kernel_positions, -1)
        by_position = gradient.reshape(len(total), -1, place.shape[2])
        if len(positions.live) == positions.kernel_positions:
            place += by_position
        else:
            place[:, list(positions.live)] += by_position


def map_of(tensor: Tensor, *, touch: bool = True) -> Map:
    """Return the address and layout of a map [batch, channels, *size], channels first or last."""
    flat = tensor.view(*tensor.shape[:2], -1)
    return Map(flat.data_ptr() if touch else None, *flat.stride(), flat.shape[2])


def _padded(cells: int) -> int:
    return -(-cells // lanes()) * lanes()
