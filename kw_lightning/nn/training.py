"""Dynamic layers in training: a layer's step as one call in C forward and one backwards, told once a size.

For few samples or small maps, calling an attention's and a convolution's operators, and those of their gradients, takes
longer than computing them. What a step goes by is compared at every call, and where its tensors lie is told anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.engine import AttentionFactors, Epilogue, collecting, evaluation, kept, reference, training
from kw_lightning.nn.engine.gradients import gradient_of
from kw_lightning.nn.engine.layouts import first_or_last
from kw_lightning.nn.engine.native import GIVEN, OF_BATCH, OF_SAMPLE, Given, Learnt
from kw_lightning.nn.engine.workspace import in_huge_pages
from kw_lightning.nn.evaluation import MOST_CALLS, Calls, fitting, is_read, tensors_of
from kw_lightning.nn.hidden import count_batch, is_watched, statistics_of
from kw_lightning.nn.precision import PLAIN, is_plain

if TYPE_CHECKING:
    from kw_lightning.nn.layer import KWLayer

_NOTHING = Epilogue()
_ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


class LayerStep(NamedTuple):
    """A layer's step, and its tensors as they are now."""

    step: training.Step
    learnt: Learnt
    given: Given

    def attend(self, x: Tensor, *, alone: bool = False) -> None:
        """Make α of x and the gradients of the attention alone, to be timed, x's in the place of its own.

        Args:
            x: as of `train`.
            alone: do nothing at all but call C.
        """
        of_x = torch.empty_like(x) if x.grad is None else x.grad
        wanted = Learnt(*map(_empty_like, self.learnt))  # type: ignore[arg-type]
        self.step.attend(x, self.learnt, self.given, of_x, wanted, alone=alone)


def train(layer: KWLayer, x: Tensor) -> Tensor | None:
    """Return a layer's output for x, without its scale and bias, where that is one call in C; else None.

    Args:
        x: [batch, in_channels, *size], **or** what the layer refuses.
    """
    found = find_step(layer, x)
    if found is None:
        return None
    attention: Any = layer.attention
    kept.forget(found.learnt.weight)
    y: Tensor = _Training.apply(x, *found.learnt, found.given, found.step, attention.annealed, attention.norm)
    return y


def find_step(layer: KWLayer, x: Tensor) -> LayerStep | None:
    """Return a layer's step for x in training, None where it is to do as it always does; x as of `train`."""
    if type(x) not in PLAIN or not x.is_cpu or x.dtype != torch.float32 or x.dim() < 2:
        return None
    attention = layer._modules.get("attention")
    if (
        torch.is_autocast_enabled("cpu")
        or not torch.is_grad_enabled()
        or is_watched()
        or not isinstance(attention, ContrastingAttention)
    ):
        return None
    norm: Any = attention._modules["norm"]
    if not _is_plain(attention, norm):
        return None
    tensors: Any = tensors_of(layer, attention, _NOTHING)
    sizes = _sizes(tensors)
    if sizes is None:
        return None
    cells, temperature, initial, reduce, reduce_bias, scale, shift, mean, variance, weight, bias, *_ = tensors
    learnt = Learnt(cells, reduce, reduce_bias, scale, shift, weight, bias)
    if not all(tensor is None or tensor.requires_grad for tensor in learnt):
        return None
    statistics, setting = statistics_of(norm, len(x)), evaluation.setting()
    goes_by = x.shape, x.stride(), *sizes, layer.engine, layer._geometry, statistics, norm.eps, setting
    steps = Calls.of(layer).steps
    if goes_by not in steps:
        if len(steps) >= MOST_CALLS:
            steps.clear()
        steps[goes_by] = _prepare(layer, attention, x, tensors, statistics)
    step = steps[goes_by]
    tau = temperature if attention.annealed else _ZERO
    return None if step is None else LayerStep(step, learnt, Given(tau, initial, mean, variance))


def _prepare(
    layer: KWLayer, attention: ContrastingAttention, x: Tensor, tensors: list[Tensor | None], statistics: int
) -> training.Step | None:
    of = fitting(layer, attention, x, tensors)
    if of is None:
        return None
    convolution = layer._over_positions()
    cells = of.cells.view(-1, *convolution.cell_shape)
    return training.prepare(x, of.attention(attention.norm.eps), cells, convolution, layer.engine, statistics)


def _is_plain(attention: ContrastingAttention, norm: nn.Module) -> bool:
    """Return whether an attention is nothing but its two linear layers and the norm between."""
    if not attention.has_factors or attention.low_rank is not None or attention.gates is not None:
        return False
    kind = nn.BatchNorm1d if isinstance(norm, nn.BatchNorm1d) else nn.LayerNorm
    return is_plain(attention.reduce, nn.Linear) and is_plain(norm, kind)


def _sizes(tensors: list[Tensor | None]) -> list[torch.Size | None] | None:
    """Return the sizes of tensors; None where C does not read one as it lies."""
    if not all(tensor is None or (type(tensor) in PLAIN and is_read(tensor)) for tensor in tensors):
        return None
    return [None if tensor is None else tensor.shape for tensor in tensors]


class _Training(torch.autograd.Function):
    """A layer's step with its gradients; second derivatives go through the literal form."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, *learnt, given, step, annealed, norm = arguments
        if annealed:
            given = given._replace(temperature=given.temperature.clone())  # it may be set before the backward pass
        momentum = count_batch(norm) if step.statistics == OF_BATCH else 0.0
        y, between = step.run(x, Learnt(*learnt), given, momentum)
        ctx.step, ctx.initial, ctx.epsilon = step, given.initial, norm.eps
        running: Any = given[2:] if step.statistics == GIVEN else (None, None)
        # Copies, since the norm may take note of another batch before the backward pass.
        running = [None if each is None else each.clone() for each in running]
        ctx.save_for_backward(x, *learnt, given.temperature, between, *running)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parts, temperature, between, mean, variance = ctx.saved_tensors
        learnt, given = Learnt(*parts), Given(temperature, ctx.initial, mean, variance)
        needed = ctx.needs_input_grad[: 1 + len(learnt)]
        nothing = [None] * (len(ctx.needs_input_grad) - len(needed))
        if reference.differentiates(gradient) or is_watched() or type(gradient) not in PLAIN:
            return (*_literal_gradients(ctx, gradient, x, learnt, given, needed), *nothing)
        cells = learnt.cells
        assert cells is not None
        collects = needed[1] and collecting.may_collect(cells)
        collected = collecting.find(cells) if collects else None
        of_x = in_huge_pages(torch.empty_like(x)) if needed[0] else None
        of_cells = collected
        if needed[1] and collected is None:
            of_cells = gradient_of(cells, cells.dtype)
        others = [*map(_empty_like, learnt[1:])]
        wanted = Learnt(of_cells, *others)  # type: ignore[arg-type]
        told = first_or_last(gradient), x, between, learnt, given
        ctx.step.differentiate(*told, of_x, wanted, adds=collected is not None)
        if collected is not None:
            of_cells = None  # it is with another layer's
        elif collects and of_cells is not None:
            collecting.hand_over(cells, of_cells)
        found = zip(others, needed[2:], strict=True)
        return (of_x, of_cells, *(tensor if need else None for tensor, need in found), *nothing)


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _literal_gradients(
    ctx: Any, gradient: Tensor, x: Tensor, learnt: Learnt, given: Given, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return gradients of operators that everything knows, and that can be differentiated again."""
    temperature, initial, mean, variance = given
    running = None if mean is None or variance is None else (mean, variance)

    def convolve(x: Tensor, cells: Tensor, reduce: Tensor, *others: Any) -> Tensor:
        reduce_bias, scale, shift, weight, bias = others
        by_sample = ctx.step.statistics == OF_SAMPLE
        linear = reduce, reduce_bias, scale, shift
        hidden = reference.activate(x.flatten(2), *linear, running, ctx.epsilon, by_sample=by_sample)
        alpha = AttentionFactors(hidden, weight, bias, temperature, initial).alpha()
        convolution = ctx.step.convolution
        return reference.convolve(x, alpha, cells.view(-1, *convolution.cell_shape), convolution)

    return reference.differentiate(convolve, (x, *learnt), gradient, needed)
