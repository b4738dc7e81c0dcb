"""The engine as one operator of PyTorch, which compilers, transforms and dispatch treat as they do a convolution.

`kw_lightning::dynamic_convolution` keeps its inputs for the backward pass and nothing else; the backward pass is an
operator as well. Second derivatives go through the literal form, which is made of differentiable operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kw_lightning.nn.engine import collecting, computing, reference, work
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.gradients import imagine_gradients
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.planner import check_engine, choose
from kw_lightning.nn.precision import plain

NAME = "kw_lightning::dynamic_convolution"


@torch.library.custom_op(NAME, mutates_args=())
def dynamic_convolution(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
) -> Tensor:
    """Convolve every sample of x [batch, in_channels, *size] with its own mixture of cells, in x's type."""
    convolution = Convolution.of(cells.shape[1:], geometry)
    x, attention, cells = map(plain, (x, attention, cells))
    path = choose(x, attention, cells, convolution, engine, backward=False)
    return computing.forward(x, attention, cells, convolution, path)


@dynamic_convolution.register_fake
def _(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
) -> Tensor:
    convolution = Convolution.of(cells.shape[1:], geometry)
    check_engine(engine, convolution)
    return empty_output(x, convolution)


@torch.library.custom_op(NAME + "_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    convolution = Convolution.of(cells.shape[1:], geometry)
    path = choose(x, attention, cells, convolution, engine, backward=True)
    return computing.backward(gradient, x, attention, cells, convolution, path, needed)


@_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    return imagine_gradients((x, attention, cells), needed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, attention, cells, ctx.geometry, ctx.engine = inputs
    ctx.save_for_backward(x, attention, cells)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradient, *tensors = map(plain, (gradient, *ctx.saved_tensors))
    needed = list(ctx.needs_input_grad[:3])
    if reference.differentiates(gradient):
        gradients = _literal_gradients(gradient, tensors, Convolution.of(tensors[2].shape[1:], ctx.geometry), needed)
    else:
        found = _find_gradients(gradient, tensors, ctx.geometry, ctx.engine, needed)
        gradients = [tensor if need else None for tensor, need in zip(found, needed, strict=True)]
    return (*gradients, None, None)


def _find_gradients(
    gradient: Tensor, tensors: Sequence[Tensor], geometry: Sequence[int], engine: str, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return the gradients; by the operator unless that of the cells is collected, which is done in place."""
    x, attention, cells = tensors
    if needed[2] and collecting.may_collect(cells):
        convolution = Convolution.of(cells.shape[1:], geometry)
        return collecting.backward(gradient, x, attention, cells, convolution, engine, needed)
    found: list[Tensor] = _backward(gradient, *tensors, geometry, engine, needed)
    return found


dynamic_convolution.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.kw_lightning.dynamic_convolution)
def _forward_operations(
    x: torch.Size,
    attention: torch.Size,
    cells: torch.Size,
    geometry: Sequence[int],
    engine: str,
    *,
    out_shape: torch.Size,
) -> int:
    """Return the floating-point operations for FLOP counters, which hand in shapes for tensors."""
    convolution = Convolution.of(cells[1:], geometry)
    positions = math.prod(x[2:]), math.prod(out_shape[2:])
    return 2 * x[0] * work.forward(engine, convolution, cells[0], *positions)


@register_flop_formula(torch.ops.kw_lightning.dynamic_convolution_backward)
def _backward_operations(
    gradient: torch.Size,
    x: torch.Size,
    attention: torch.Size,
    cells: torch.Size,
    geometry: Sequence[int],
    engine: str,
    needed: Sequence[bool],
    *,
    out_shape: Sequence[torch.Size],
) -> int:
    convolution = Convolution.of(cells[1:], geometry)
    positions = math.prod(x[2:]), math.prod(gradient[2:])
    return 2 * x[0] * work.backward(engine, convolution, cells[0], *positions, needed)


def _literal_gradients(
    gradient: Tensor, tensors: Sequence[Tensor], convolution: Convolution, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again."""

    def convolve(x: Tensor, attention: Tensor, cells: Tensor) -> Tensor:
        return reference.convolve(x, attention.to(x.dtype), cells.to(x.dtype), convolution)

    return reference.differentiate(convolve, tensors, gradient, needed)
