"""A layer in evaluation as one call of C, prepared but for the addresses of its maps: see evaluation.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.native import attention, layout
from kw_lightning.nn.engine.native.calls import Call, map_of, prepare
from kw_lightning.nn.engine.native.forms import Form, opened
from kw_lightning.nn.engine.native.positions import Reads
from kw_lightning.nn.engine.workspace import flat_scratch, in_huge_pages

METHODS = ("kw_mix_kernels", "kw_mix_inputs", "kw_mix_depthwise", "kw_mix_lines", "kw_mix_rows")
"""The functions that compute the convolution, numbered as in evaluation.h."""


@dataclass(frozen=True)
class AttentionTensors:
    """What α is computed from; see `native.activate` and `native.weigh`.

    Attributes:
        given: the norm's mean and variance, None where they are a sample's.
        epsilon: of the norm.
    """

    reduce: Tensor
    reduce_bias: Tensor | None
    scale: Tensor
    shift: Tensor
    given: tuple[Tensor, Tensor] | None
    epsilon: float
    weight: Tensor
    bias: Tensor
    initial: Tensor
    temperature: Tensor


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A call of a layer, for maps of the same sizes and layouts; threads may share it.

    It knows the tensors that it reads by their addresses: the caller must keep them alive.

    Attributes:
        function: of the library.
        told: its arguments.
        numbers: the size of its scratch memory.
        size, stride: of the output.
        positions: the tables that it reads, kept alive.
    """

    function: Callable[..., None]
    told: layout.Evaluation
    numbers: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    positions: Reads

    def run(self, x: Tensor, added: Tensor | None) -> Tensor:
        """Return the layer's output for x, after the epilogue, with `added` as the map to add."""
        y = in_huge_pages(x.new_empty_strided(self.size, self.stride))
        self._call(x, x.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr())
        return y

    def attend(self, x: Tensor, *, alone: bool = False) -> None:
        """Compute only α of x, for timing; with `alone` only call C, which then does nothing."""
        self._call(x, None if alone else x.data_ptr(), None, None)

    def _call(self, like: Tensor, x: int | None, added: int | None, y: int | None) -> None:
        memory = flat_scratch("native", self.numbers, like)
        self.function(ctypes.byref(self.told), x, added, y, memory.data_ptr())


def prepare_evaluation(
    x: Tensor,
    of: AttentionTensors,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    form: Form,
    epilogue: Epilogue,
) -> Evaluation:
    """Return the call of a layer, all in single precision on a CPU.

    Args:
        x: [batch, in_channels, *size], channels first or last in memory; only its layout is read, as that of y.
        of: contiguous tensors.
        cells: E [cells, co, ci, *ones], contiguous.
        y: [batch, out_channels, *output_size].
        form: the pass.
        epilogue: of y; one that fits it.
    """
    alpha = x.new_empty(len(x), len(of.initial), len(cells))
    call = prepare(x, alpha, cells, convolution, y, form, epilogue)
    statistics = attention.OF_SAMPLE if of.given is None else attention.GIVEN
    told = tell(call, METHODS.index(form.functions[0]), *extents(x, of, cells, statistics))
    for name, tensor in zip(("mean", "variance"), of.given or (), strict=False):
        setattr(told.hidden, name, tensor.data_ptr())
    told.hidden.reduce, told.hidden.scale, told.hidden.shift = (t.data_ptr() for t in (of.reduce, of.scale, of.shift))
    told.hidden.bias = None if of.reduce_bias is None else of.reduce_bias.data_ptr()
    for name in ("weight", "bias", "temperature", "initial"):
        setattr(told.weighing, name, getattr(of, name).data_ptr())
    loaded = opened()
    numbers = loaded.kw_evaluate_memory(ctypes.byref(told))
    return Evaluation(loaded.kw_evaluate, told, numbers, tuple(y.shape), y.stride(), call.positions)


def extents(x: Tensor, of: AttentionTensors, cells: Tensor, statistics: int) -> tuple[layout.Hidden, layout.Weighing]:
    """Return what an attention's two steps are told but for the places of tensors.

    Args:
        x: [batch, in_channels, *size].
        of: contiguous tensors.
        cells: E [cells, co, ci, *ck].
        statistics: whose mean and variance its norm takes.
    """
    batch, mixtures, (width, channels) = len(x), len(of.initial), of.reduce.shape
    threads = attention.threads_for(max(batch * channels * width, x.numel()), batch * channels)
    sizes = batch, channels, width, threads, statistics
    hidden = layout.Hidden(*sizes, of.epsilon, 0.0, map_of(x, touch=False))
    threads = attention.threads_for(batch * of.weight.numel(), mixtures)
    return hidden, layout.Weighing(batch, mixtures, len(cells), width, threads)


def tell(call: Call, method: int, hidden: layout.Hidden, weighing: layout.Weighing) -> layout.Evaluation:
    """Return the arguments of a layer's call: those of the pass, its number, and those of the attention's steps."""
    live = call.positions.selection
    place, numbers = None if live is None else live.data_ptr(), call.cells.numel()
    return layout.Evaluation(hidden, weighing, call.arguments, method, call.positions.kernel_positions, place, numbers)
