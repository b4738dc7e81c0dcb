"""The engine as one operator on the attention's factors: neither α nor any kernel is kept for the backward pass.

`kw_lightning::factored_convolution` is the attention's last linear layer, the normalisation of α and the convolution;
its backward pass is an operator as well. Second derivatives go through the literal form, as in `operators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kw_lightning.nn.engine import collecting, computing, kept, reference, work
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.gradients import imagine_gradients
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.planner import check_engine, choose
from kw_lightning.nn.precision import PLAIN, is_recorded, plain

NAME = "kw_lightning::factored_convolution"
TENSORS = 5  # the arguments that may need a gradient come first: x, hidden, weight, bias, cells


@torch.library.custom_op(NAME, mutates_args=())
def factored_convolution(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cells: Tensor,
    temperature: Tensor,
    initial: Tensor,
    geometry: Sequence[int],
    engine: str,
    lasting: bool,
) -> Tensor:
    """Convolve every sample of x [batch, in_channels, *size] with its own mixture of cells, in x's type."""
    convolution = Convolution.of(cells.shape[1:], geometry)
    factors = AttentionFactors(plain(hidden), plain(weight), plain(bias), plain(temperature), plain(initial), lasting)
    return compute(plain(x), factors, plain(cells), convolution, engine)


def compute(
    x: Tensor,
    factors: AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Return the convolution of every sample with its own mixture of cells, after the epilogue; without gradients."""
    if not factors.lasting:
        kept.forget(factors.weight)
    path = choose(x, factors, cells, convolution, engine, backward=False)
    return computing.forward(x, factors, cells, convolution, path, epilogue)


@factored_convolution.register_fake
def _(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cells: Tensor,
    temperature: Tensor,
    initial: Tensor,
    geometry: Sequence[int],
    engine: str,
    lasting: bool,
) -> Tensor:
    convolution = Convolution.of(cells.shape[1:], geometry)
    check_engine(engine, convolution)
    return empty_output(x, convolution)


def _find_all(
    gradient: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cells: Tensor,
    temperature: Tensor,
    initial: Tensor,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    convolution = Convolution.of(cells.shape[1:], geometry)
    factors = AttentionFactors(hidden, weight, bias, temperature, initial)
    path = choose(x, factors, cells, convolution, engine, backward=True)
    of_parts = [needed[0], any(needed[1:4]), needed[4]]
    return computing.backward(gradient, x, factors, cells, convolution, path, of_parts)


_backward = torch.library.custom_op(NAME + "_backward", _find_all, mutates_args=())


@_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cells: Tensor,
    temperature: Tensor,
    initial: Tensor,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    attention = any(needed[1:4])
    return imagine_gradients((x, hidden, weight, bias, cells), (needed[0], *[attention] * 3, needed[4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.geometry, ctx.engine, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradient, *tensors = map(plain, (gradient, *ctx.saved_tensors))
    needed = list(ctx.needs_input_grad[:TENSORS])
    if reference.differentiates(gradient):
        gradients = _literal_gradients(gradient, tensors, Convolution.of(tensors[4].shape[1:], ctx.geometry), needed)
    else:
        found = _find_gradients(gradient, tensors, ctx.geometry, ctx.engine, needed)
        gradients = [tensor if need else None for tensor, need in zip(found, needed, strict=True)]
    return (*gradients, *[None] * (len(ctx.needs_input_grad) - TENSORS))


def _find_gradients(
    gradient: Tensor, tensors: Sequence[Tensor], geometry: Sequence[int], engine: str, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return the gradients; by the operator unless that of the cells is collected, which is done in place."""
    x, hidden, weight, bias, cells, temperature, initial = tensors
    if not needed[4] or not collecting.may_collect(cells):
        plain = _is_plain((gradient, *tensors)) and not torch._C._are_functorch_transforms_active()
        find: Callable[..., list[Tensor]] = _find_all if plain else _backward
        return find(gradient, *tensors, geometry, engine, needed)
    factors = AttentionFactors(hidden, weight, bias, temperature, initial)
    of_parts = [needed[0], any(needed[1:4]), needed[4]]
    convolution = Convolution.of(cells.shape[1:], geometry)
    return collecting.backward(gradient, x, factors, cells, convolution, engine, of_parts)


factored_convolution.register_autograd(_differentiate, setup_context=_save)


class _Called(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than the work of a small layer."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, hidden, weight, bias, cells, temperature, initial, geometry, engine, lasting = arguments
        _save(ctx, arguments, x)
        factors = AttentionFactors(hidden, weight, bias, temperature, initial, lasting)
        return compute(x, factors, cells, Convolution.of(cells.shape[1:], geometry), engine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _differentiate(ctx, gradient)


def call(*arguments: Any) -> Tensor:
    """Return the operator's output, without its dispatch where nothing records, watches or replaces operators."""
    if _is_plain(arguments[:TENSORS]):
        y: Tensor = _Called.apply(*arguments)
        return y
    operator: Tensor = factored_convolution(*arguments)
    return operator


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are plain, on a CPU or GPU, and nothing records, watches or replaces operators."""
    if tensors[0].device.type not in ("cpu", "cuda") or not all(type(tensor) in PLAIN for tensor in tensors):
        return False
    return not is_recorded() and torch._C._len_torch_dispatch_stack() == 0


def _literal_gradients(
    gradient: Tensor, tensors: Sequence[Tensor], convolution: Convolution, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again."""
    *learnt, temperature, initial = tensors

    def convolve(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, cells: Tensor) -> Tensor:
        alpha = AttentionFactors(hidden, weight, bias, temperature, initial).alpha()
        return reference.convolve(x, alpha.to(x.dtype), cells.to(x.dtype), convolution)

    return reference.differentiate(convolve, learnt, gradient, needed)


@register_flop_formula(torch.ops.kw_lightning.factored_convolution)
def _forward_operations(
    x: torch.Size,
    hidden: torch.Size,
    weight: torch.Size,
    bias: torch.Size,
    cells: torch.Size,
    temperature: torch.Size,
    initial: torch.Size,
    geometry: Sequence[int],
    engine: str,
    lasting: bool,
    *,
    out_shape: torch.Size,
) -> int:
    """Return the floating-point operations for FLOP counters: of the last linear layer and of the convolution."""
    convolution = Convolution.of(cells[1:], geometry)
    positions = math.prod(x[2:]), math.prod(out_shape[2:])
    mixing = work.forward(engine, convolution, cells[0], *positions, batch=x[0], width=hidden[1])
    return 2 * (x[0] * math.prod(weight) + mixing)


@register_flop_formula(torch.ops.kw_lightning.factored_convolution_backward)
def _backward_operations(
    gradient: torch.Size,
    x: torch.Size,
    hidden: torch.Size,
    weight: torch.Size,
    bias: torch.Size,
    cells: torch.Size,
    temperature: torch.Size,
    initial: torch.Size,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
    *,
    out_shape: Sequence[torch.Size],
) -> int:
    """Return the floating-point operations; recomputing z is left out, as is mixing the kernels again."""
    convolution = Convolution.of(cells[1:], geometry)
    positions = math.prod(x[2:]), math.prod(gradient[2:])
    attention = any(needed[1:4])
    of_parts = [needed[0], attention, needed[4]]
    mixing = work.backward(engine, convolution, cells[0], *positions, of_parts, batch=x[0], width=hidden[1])
    return 2 * (2 * x[0] * attention * math.prod(weight) + mixing)
