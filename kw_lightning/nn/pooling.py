"""The means of a layer's input for its attention, on a GPU in training: their gradient is added to the layer's own.

Autograd would make a map of the means' gradient, and add it to the layer's number by number: four times as long as
reading and writing a map once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kw_lightning.nn.engine import reference
from kw_lightning.nn.engine.tiles import launches, pooling
from kw_lightning.nn.hidden import is_watched
from kw_lightning.nn.precision import PLAIN, autocast_type

LARGEST_MEAN = 1e15  # of an input channel; its square has room in float32


def pool(x: Tensor, *, channels_last: bool) -> tuple[Tensor, Tensor | None]:
    """Return (x, its means [batch, channels] in single precision, within reach), to which both gradients are to come.

    The means are None where torch's operators are to be called.

    Args:
        x: [batch, channels, *size], or [batch, *tokens, channels] with `channels_last`.
    """
    if is_watched() or not (x.requires_grad and torch.is_grad_enabled()) or x.device.type != launches.device_type():
        return x, None
    if x.dim() < 3 or type(x) not in PLAIN or not pooling.pools(x if channels_last else x.movedim(1, -1)):
        return x, None
    return _Pooling.apply(x, channels_last, is_half(x))  # type: ignore[no-any-return]


def is_half(x: Tensor) -> bool:
    """Return whether what x is made of may come from half precision."""
    return x.dtype.itemsize < 4 or autocast_type(x.device) is not None


def within_reach(means: Tensor) -> Tensor:
    """Return finite means of what may come from half precision.

    bfloat16 reaches as far as float32: sums of its largest values, and their squares in the norm, would overflow.
    """
    return means.nan_to_num(0.0).clamp(-LARGEST_MEAN, LARGEST_MEAN)


class _Pooling(torch.autograd.Function):
    """x and its means; the gradient of one that is out of reach is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels_last: bool, half: bool) -> tuple[Tensor, Tensor]:
        positions = range(1, x.dim() - 1) if channels_last else range(2, x.dim())
        means = x.mean(dim=list(positions), dtype=torch.float32)
        means = within_reach(means) if half else means
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(means)
        ctx.shape, ctx.channels_last, ctx.limit = x.shape, channels_last, LARGEST_MEAN if half else torch.inf
        return x.view_as(x), means

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_means: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (means,) = ctx.saved_tensors
        if of_means is None:
            return of_x, None, None
        last = of_x if ctx.channels_last or of_x is None else of_x.movedim(1, -1)
        if last is not None and not reference.differentiates(last) and pooling.pools(last):
            found = pooling.add_to_positions(last, of_means, means, ctx.limit)
            return found if ctx.channels_last else found.movedim(-1, 1), None, None
        positions = ctx.shape[1:-1] if ctx.channels_last else ctx.shape[2:]
        shape = [len(means), *[1] * len(positions)]
        shape.insert(len(shape) if ctx.channels_last else 1, means.shape[1])
        spread = torch.where(means.abs() < ctx.limit, of_means / positions.numel(), 0.0).view(shape)
        return spread.expand(ctx.shape) if of_x is None else of_x + spread.to(of_x.dtype), None, None
