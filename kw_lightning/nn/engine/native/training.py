"""A layer in training as one call of C forward and one backward, prepared but for addresses: see training.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.attention import OF_BATCH
from kw_lightning.nn.engine.native.calls import prepare, prepare_backward
from kw_lightning.nn.engine.native.evaluation import METHODS, AttentionTensors, extents, tell
from kw_lightning.nn.engine.native.forms import Form, opened
from kw_lightning.nn.engine.native.positions import Reads
from kw_lightning.nn.engine.workspace import flat_scratch, in_huge_pages

BACKWARD_METHODS = (
    "kw_mix_kernels",
    "kw_mix_inputs_backward",
    "kw_mix_depthwise",
    "kw_mix_lines_backward",
    "kw_mix_rows_backward",
)
"""The functions that compute gradients, numbered as in training.c."""


class Learnt(NamedTuple):
    """A layer's parameters, **or** their gradients: in single precision on a CPU, contiguous.

    Attributes:
        cells: E [cells, co, ci, *ck].
        reduce, reduce_bias: of the attention's first linear layer, [width, in_channels] and [width].
        scale, shift: of its norm, [width].
        weight, bias: of its last linear layer.
    """

    cells: Tensor | None
    reduce: Tensor
    reduce_bias: Tensor | None
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor


class Given(NamedTuple):
    """A layer's buffers, likewise in single precision on a CPU, contiguous.

    Attributes:
        temperature: τ, a scalar.
        initial: β [mixtures], whole numbers.
        mean, variance: of the attention's norm, [width], running; None where it keeps none.
    """

    temperature: Tensor
    initial: Tensor
    mean: Tensor | None
    variance: Tensor | None


class _Told(NamedTuple):
    """One direction of a step: its arguments, the size of its memory, and the tables that it reads, kept alive."""

    call: layout.Evaluation
    memory: int
    positions: Reads


@dataclass(frozen=True, eq=False)
class Step:
    """A layer's step in training, for maps of the same sizes and layouts; threads may share it.

    Attributes:
        convolution: the geometry.
        form: the pass of the backward direction.
        statistics: which mean and variance the attention's norm takes.
        size, stride: of the output.
        forward: the forward call.
        kept: how many numbers the forward call keeps for the backward call.
        backward: the backward calls, by the strides of the output's gradient.
    """

    convolution: Convolution
    form: Form
    statistics: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    forward: _Told
    kept: int
    backward: dict[tuple[int, ...], _Told] = field(default_factory=dict)

    def run(self, x: Tensor, learnt: Learnt, given: Given, momentum: float) -> tuple[Tensor, Tensor]:
        """Return the output without the layer's bias, and what is kept for the gradients.

        Args:
            momentum: of the update of the attention's running statistics.
        """
        y, kept = in_huge_pages(x.new_empty_strided(self.size, self.stride)), x.new_empty(self.kept)
        self._forward(x, x.data_ptr(), y.data_ptr(), kept, learnt, given, momentum)
        if self.statistics == OF_BATCH and given.mean is not None and given.variance is not None:
            increment_version((given.mean, given.variance))
        return y, kept

    def differentiate(
        self,
        gradient: Tensor,
        x: Tensor,
        kept: Tensor,
        learnt: Learnt,
        given: Given,
        of_x: Tensor | None,
        wanted: Learnt,
        *,
        adds: bool,
    ) -> None:
        """Write the gradients.

        Args:
            gradient: of the output, channels first or last in memory.
            x, learnt, given: as in `run`.
            kept: what `run` returned.
            of_x: the gradient of x, laid out as x; None if it is not needed.
            wanted: the gradients of `learnt`; None for that of the cells if it is not needed.
            adds: add to the gradient of the cells instead of overwriting it.
        """
        told = self._told(gradient, x, learnt)
        self._backward(told, x, x.data_ptr(), gradient.data_ptr(), kept, learnt, given, of_x, wanted, adds=adds)

    def attend(self, x: Tensor, learnt: Learnt, given: Given, of_x: Tensor, wanted: Learnt, *, alone: bool) -> None:
        """Compute α of x and the attention's gradients, but no convolution; for timing.

        Args:
            x, learnt, given, of_x, wanted: as in `differentiate`.
            alone: only call C, which then does nothing.
        """
        kept, place = x.new_empty(self.kept), None if alone else x.data_ptr()
        told = self._told(x.new_empty_strided(self.size, self.stride), x, learnt)
        self._forward(x, place, None, kept, learnt, given, 0.0)
        self._backward(told, x, place, None, kept, learnt, given, of_x, wanted, adds=False)

    def _forward(
        self, like: Tensor, x: int | None, y: int | None, kept: Tensor, learnt: Learnt, given: Given, momentum: float
    ) -> None:
        memory = flat_scratch("native", self.forward.memory, like)
        maps = x, y, kept.data_ptr(), memory.data_ptr()
        tensors = layout.Tensors(*maps, momentum, *_places(learnt), *_places(given))
        opened().kw_train(ctypes.byref(self.forward.call), ctypes.byref(tensors))

    def _backward(
        self,
        told: _Told,
        like: Tensor,
        x: int | None,
        gradient: int | None,
        kept: Tensor,
        learnt: Learnt,
        given: Given,
        of_x: Tensor | None,
        wanted: Learnt,
        *,
        adds: bool,
    ) -> None:
        memory = flat_scratch("native", told.memory, like)
        maps = x, None, kept.data_ptr(), memory.data_ptr()
        of_maps = gradient, None if of_x is None else of_x.data_ptr()
        tensors = layout.Tensors(*maps, 0.0, *_places(learnt), *_places(given), *of_maps, adds, *_places(wanted))
        opened().kw_train_backward(ctypes.byref(told.call), ctypes.byref(tensors))

    def _told(self, gradient: Tensor, x: Tensor, learnt: Learnt) -> _Told:
        """Return the backward call for a gradient with these strides, prepared the first time."""
        told = self.backward.get(gradient.stride())
        if told is None:
            assert learnt.cells is not None
            told = self.backward[gradient.stride()] = self._prepare(gradient, x, learnt.cells)
        return told

    def _prepare(self, gradient: Tensor, x: Tensor, cells: Tensor) -> _Told:
        hidden, weighing = self.forward.call.hidden, self.forward.call.weighing
        alpha = x.new_empty(len(x), weighing.mixtures, len(cells))
        call = prepare_backward(gradient, x, alpha, cells, self.convolution, self.form)
        told = tell(call, BACKWARD_METHODS.index(self.form.functions[1]), hidden, weighing)
        return _Told(told, opened().kw_train_backward_memory(ctypes.byref(told)), call.positions)


def prepare_step(
    x: Tensor,
    of: AttentionTensors,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    forms: tuple[Form, Form],
    statistics: int,
) -> Step:
    """Return the step of a layer, all in single precision on a CPU.

    Args:
        x: [batch, in_channels, *size], channels first or last in memory; of all tensors only the layouts are read.
        of: what α is computed from, contiguous.
        cells: E [cells, co, ci, *ones], contiguous.
        y: [batch, out_channels, *output_size].
        forms: the passes forward and backward.
        statistics: which mean and variance the attention's norm takes.
    """
    alpha = x.new_empty(len(x), len(of.initial), len(cells))
    call = prepare(x, alpha, cells, convolution, y, forms[0])
    told = tell(call, METHODS.index(forms[0].functions[0]), *extents(x, of, cells, statistics))
    loaded = opened()
    forward = _Told(told, loaded.kw_train_memory(ctypes.byref(told)), call.positions)
    kept = loaded.kw_kept_memory(ctypes.byref(told))
    return Step(convolution, forms[1], statistics, tuple(y.shape), y.stride(), forward, kept)


def _places(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
