"""Calls of attention.c: an attention without its mean over positions, in single precision on a CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.library import library

GIVEN, OF_BATCH, OF_SAMPLE = range(3)
"""Whose mean and variance a norm takes: see attention.h."""

# Multiply-adds that are worth a second thread.
SHARED = 2**18


def weighs(x: Tensor) -> bool:
    """Return whether the functions here take numbers as those of x."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


@dataclass(frozen=True)
class Activated:
    """Hidden activations, and what their gradient is made of.

    Attributes:
        pooled: means over positions, [batch, channels].
        hidden: [batch, width].
        raw: before the norm, [batch, width].
        mean, variance: the norm's, [width], or [batch] of each sample's numbers.
    """

    pooled: Tensor
    hidden: Tensor
    raw: Tensor
    mean: Tensor
    variance: Tensor


def activate(
    x: Tensor,
    reduce: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    given: tuple[Tensor, Tensor] | None,
    statistics: int,
    epsilon: float,
) -> Activated:
    """Return the hidden activations: mean over positions, linear layer, norm, ReLU.

    Args:
        x: [batch, channels, positions], channels or positions together in memory, **or** its means [batch, channels];
            they and all other tensors are contiguous.
        reduce, bias: of the linear layer, [width, channels] and [width].
        scale, shift: of the norm, [width].
        given: the norm's mean and variance, [width], where `statistics` says so.
        statistics: whose mean and variance the norm takes.
        epsilon: of the norm.
    """
    (width, channels), batch = reduce.shape, x.shape[0]
    raw, hidden = x.new_empty(2, batch, width).unbind()
    mean, variance = given or x.new_empty(2, batch if statistics == OF_SAMPLE else width).unbind()
    pooled, place = x, layout.Map()
    if x.dim() == 3:
        pooled, place = x.new_empty(batch, channels), layout.Map(x.data_ptr(), *x.stride(), x.shape[2])
    threads = threads_for(max(batch * channels * width, x.numel()), batch * channels)
    sizes = batch, channels, width, threads, statistics, epsilon, place
    tensors = pooled, reduce, bias, scale, shift, mean, variance, raw, hidden
    call = layout.Hidden(*sizes, *(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    _library().kw_hidden(ctypes.byref(call))
    return Activated(pooled, hidden, raw, mean, variance)


def differentiate_activations(
    gradient: Tensor, found: Activated, scale: Tensor, statistics: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (what is normalised, scale, shift) from that of the hidden activations."""
    batch, width = gradient.shape
    of_raw = gradient.clone(memory_format=torch.contiguous_format)
    of_scale, of_shift = gradient.new_empty(2, width).unbind()
    call = layout.Hidden(batch, 0, width, 1, statistics, epsilon)
    call.scale, call.mean, call.variance = scale.data_ptr(), found.mean.data_ptr(), found.variance.data_ptr()
    call.raw, call.hidden, call.gradient = found.raw.data_ptr(), found.hidden.data_ptr(), of_raw.data_ptr()
    call.scale_gradient, call.shift_gradient = of_scale.data_ptr(), of_shift.data_ptr()
    _library().kw_hidden_backward(ctypes.byref(call))
    return of_raw, of_scale, of_shift


def weigh(hidden: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, temperature: Tensor) -> Tensor:
    """Return α [batch, mixtures, cells]; see `AttentionFactors` for the arguments."""
    return _weigh(hidden, weight, bias, initial, temperature, terms=3)


def add_up(hidden: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, temperature: Tensor) -> Tensor:
    """Return Σ|z| + 1e-3 of every mixture, [batch, mixtures]; see `AttentionFactors` for the arguments."""
    return _weigh(hidden, weight, bias, initial, temperature, terms=2)


def _weigh(hidden: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, temperature: Tensor, *, terms: int) -> Tensor:
    hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
    extents = _extents(hidden, weight, initial)
    found = hidden.new_empty(extents[:terms])
    places = _places(hidden, weight, bias, temperature, initial)
    _run("kw_weigh", layout.Weighing(*extents, *places, *_place_by_terms(found)), hidden)
    return found


def differentiate_weights(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (hidden, weight, bias) from that of α [batch, mixtures, cells], **or** of `add_up`."""
    if not len(hidden):
        return torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
    gradient, hidden, weight, bias = (tensor.contiguous() for tensor in (gradient, hidden, weight, bias))
    extents = _extents(hidden, weight, initial)
    batch, _, _, width, threads = extents
    loaded = _library()
    of_hidden = hidden.new_zeros(threads, batch, -(-width // loaded.kw_lanes()) * loaded.kw_lanes())
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    places = _places(hidden, weight, bias, temperature, initial)
    written = _places(of_hidden, of_weight, of_bias)
    _run("kw_weigh_backward", layout.Weighing(*extents, *places, *_place_by_terms(gradient), *written), hidden)
    return of_hidden.sum(0)[:, :width].contiguous(), of_weight, of_bias


def _extents(hidden: Tensor, weight: Tensor, initial: Tensor) -> tuple[int, int, int, int, int]:
    (rows, width), batch, mixtures = weight.shape, hidden.shape[0], initial.shape[0]
    return batch, mixtures, rows // mixtures - 1, width, threads_for(batch * rows * width, mixtures)


def _places(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _place_by_terms(tensor: Tensor) -> tuple[int | None, int | None]:
    """Return the places of (α, sizes), of which the tensor is one."""
    place = tensor.data_ptr()
    return (place, None) if tensor.dim() == 3 else (None, place)


def _run(function: str, call: layout.Weighing, like: Tensor) -> None:
    """Call a function, with memory of the type of `like`."""
    loaded, told = _library(), ctypes.byref(call)
    memory = like.new_empty(loaded.kw_weigh_memory(told))
    call.memory = memory.data_ptr()
    getattr(loaded, function)(told)


def threads_for(multiply_adds: int, pieces: int) -> int:
    """Return how many threads share so much work, which can be cut into so many pieces."""
    return max(min(torch.get_num_threads(), pieces), 1) if multiply_adds > SHARED else 1


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded
