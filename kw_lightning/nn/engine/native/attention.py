"""Calls of attention.c: an attention without its mean over positions, in single precision on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kw_lightning.nn.engine.native import layout
from kw_lightning.nn.engine.native.library import library

GIVEN, OF_BATCH, OF_SAMPLE = range(3)
"""Which mean and variance a norm takes: see attention.h."""

# Multiply-adds from which on more than one thread pays.
SHARED = 2**18


def weighs(x: Tensor) -> bool:
    """Return whether the functions here take tensors of the type and device of x."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


@dataclass(frozen=True)
class Activated:
    """Hidden activations, and what their gradient is computed from.

    Attributes:
        pooled: means over positions, [batch, channels].
        hidden: [batch, width].
        raw: before the norm, [batch, width].
        mean, variance: the norm's, [width], **or** [batch] if it normalises each sample by itself.
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
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    epsilon: float,
    statistics: int,
) -> Activated:
    """Return the hidden activations: mean over positions, linear layer, norm, ReLU.

    Args:
        x: [batch, channels, positions], channels or positions together in memory, **or** its means [batch, channels];
            they and all other tensors are contiguous.
        reduce, bias: of the linear layer, [width, channels] and [width].
        scale, shift: of the norm, [width].
        running: the norm's mean and variance, [width], None where it keeps none.
        momentum: of the update of these by the batch.
        epsilon: of the norm.
        statistics: which mean and variance the norm takes.
    """
    (width, channels), batch = reduce.shape, x.shape[0]
    raw, hidden = x.new_empty(batch, width), x.new_empty(batch, width)
    noting = running if statistics == OF_BATCH else None
    if statistics == GIVEN and running is not None:
        mean, variance = running
    else:
        count = batch if statistics == OF_SAMPLE else width
        mean, variance = x.new_empty(count), x.new_empty(count)
    pooled, place = x, layout.Map()
    if x.dim() == 3:
        pooled, place = x.new_empty(batch, channels), layout.Map(x.data_ptr(), *x.stride(), x.shape[2])
    threads = threads_for(max(batch * channels * width, x.numel()), batch * channels)
    sizes = batch, channels, width, threads, statistics, epsilon, momentum, place
    tensors = pooled, reduce, bias, scale, shift, mean, variance, *(noting or (None, None)), raw, hidden
    _library().kw_hidden(ctypes.byref(layout.Hidden(*sizes, *_places_of_some(tensors))))
    if noting is not None:
        increment_version(noting)
    return Activated(pooled, hidden, raw, mean, variance)


def differentiate_activations(
    gradient: Tensor,
    found: Activated,
    reduce: Tensor,
    scale: Tensor,
    epsilon: float,
    statistics: int,
    positions: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (one position of x, reduce, bias, scale, shift) from that of the hidden activations.

    Args:
        gradient: [batch, width].
        found: what `activate` returned.
        reduce, scale, epsilon, statistics: as in `activate`.
        positions: of x.
        needed: which of the first three gradients to compute; the others are None.
    """
    (width, channels), batch = reduce.shape, gradient.shape[0]
    of_raw = gradient.clone(memory_format=torch.contiguous_format)
    of_x = gradient.new_empty(batch, channels) if needed[0] else None
    of_reduce = torch.empty_like(reduce) if needed[1] else None
    of_bias = gradient.new_empty(width) if needed[2] else None
    of_scale, of_shift = gradient.new_empty(width), gradient.new_empty(width)
    threads = threads_for(batch * channels * width, channels)
    sizes = batch, channels, width, threads, statistics, epsilon, 0.0, layout.Map(positions=positions)
    given = found.pooled, reduce, None, scale, None, found.mean, found.variance, None, None, found.raw, found.hidden
    written = of_raw, of_scale, of_shift, of_x, of_reduce, of_bias
    _library().kw_hidden_backward(ctypes.byref(layout.Hidden(*sizes, *_places_of_some((*given, *written)))))
    return of_x, of_reduce, of_bias, of_scale, of_shift


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
    of_hidden, of_weight, of_bias = (torch.empty_like(tensor) for tensor in (hidden, weight, bias))
    places = _places(hidden, weight, bias, temperature, initial)
    written = _places(of_hidden, of_weight, of_bias)
    _run("kw_weigh_backward", layout.Weighing(*extents, *places, *_place_by_terms(gradient), *written), hidden)
    return of_hidden, of_weight, of_bias


def _extents(hidden: Tensor, weight: Tensor, initial: Tensor) -> tuple[int, int, int, int, int]:
    (rows, width), batch, mixtures = weight.shape, hidden.shape[0], initial.shape[0]
    return batch, mixtures, rows // mixtures - 1, width, threads_for(batch * rows * width, mixtures)


def _places(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _places_of_some(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _place_by_terms(tensor: Tensor) -> tuple[int | None, int | None]:
    """Return the addresses of (α, sizes): the tensor is one of them, and the other None."""
    place = tensor.data_ptr()
    return (place, None) if tensor.dim() == 3 else (None, place)


def _run(function: str, call: layout.Weighing, like: Tensor) -> None:
    """Call a function, with scratch memory of the type of `like`."""
    loaded, told = _library(), ctypes.byref(call)
    memory = like.new_empty(loaded.kw_weigh_memory(told))
    call.memory = memory.data_ptr()
    getattr(loaded, function)(told)


def threads_for(multiply_adds: int, pieces: int) -> int:
    """Return how many threads share work of so many multiply-adds that can be cut into so many pieces."""
    return max(min(torch.get_num_threads(), pieces), 1) if multiply_adds > SHARED else 1


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded
