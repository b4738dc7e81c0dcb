"""The attention's hidden activations in one step: mean over positions, linear layer, norm and ReLU.

In C on a CPU; on a GPU, where the means are known already, by a launch for the norm and the ReLU.

They are few numbers: four operators of torch, and as many backwards, take longer to be called than to compute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.nn.engine import native, needs_alpha, reference
from kw_lightning.nn.engine.native import GIVEN, OF_BATCH, OF_SAMPLE, Activated
from kw_lightning.nn.engine.tiles import activating
from kw_lightning.nn.precision import PLAIN, is_plain, is_recorded

LEARNT = 5  # tensors that may need a gradient; they come first
# Which must be there, of the linear layer's weight and bias, and the norm's weight, bias, running mean and variance.
NEEDED = {GIVEN: (0, 2, 3, 4, 5), OF_BATCH: (0, 2, 3), OF_SAMPLE: (0, 2, 3)}


def activate(x: Tensor, reduce: nn.Module, norm: nn.Module) -> Tensor | None:
    """Return the hidden activations [batch, width]; None where torch's operators, or the modules, are to be called.

    Args:
        x: [batch, channels, positions], **or** its means [batch, channels].
        reduce, norm: of the attention.
    """
    if is_watched() or type(x) not in PLAIN or not x.numel():
        return None
    if x.dim() == 2:
        x = x.contiguous()  # means may be a class token's, a row of each sample's map
    elif 1 not in x.stride()[1:]:
        return None
    on_gpu = activating.activates(x)
    if not on_gpu and not native.weighs(x):
        return None
    if not is_plain(reduce, nn.Linear) or not (is_plain(norm, nn.BatchNorm1d) or is_plain(norm, nn.LayerNorm)):
        return None
    statistics = statistics_of(norm, x.shape[0])
    if on_gpu and (statistics == OF_SAMPLE or norm.momentum is None):
        return None
    # Past `nn.Module.__getattr__`, which is called for each of them otherwise.
    linear, own, buffers = reduce._parameters, norm._parameters, norm._buffers
    running = buffers.get("running_mean"), buffers.get("running_var")
    tensors: list[Any] = [linear["weight"], linear["bias"], own["weight"], own["bias"], *running]
    learns = x.requires_grad
    for index, tensor in enumerate(tensors):
        if tensor is None:
            if index not in NEEDED[statistics]:
                continue
            return None
        if (
            tensor.dtype != torch.float32
            or tensor.device != x.device
            or not tensor.is_contiguous()
            or type(tensor) not in PLAIN
        ):
            return None
        learns = learns or tensor.requires_grad
    arguments: list[Any] = [x, *tensors, statistics, norm]
    if learns and torch.is_grad_enabled():
        hidden: Tensor = _Activation.apply(*arguments)
        return hidden
    return _activate(*arguments).hidden


def _activate(
    x: Tensor,
    reduce: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    statistics: int,
    norm: Any,
) -> Activated:
    """Return the hidden activations, and let the norm take note of the batch."""
    running = (mean, variance) if mean is not None and variance is not None else None
    momentum = count_batch(norm) if statistics == OF_BATCH and running is not None else 0.0
    weights = reduce, bias, scale, shift, running, momentum, norm.eps
    if activating.activates(x):
        return activating.activate(x, *weights, given=statistics == GIVEN)
    return native.activate(x, *weights, statistics)


def count_batch(norm: Any) -> float:
    """Count a batch, and return by which momentum a norm's running statistics take note of it."""
    momentum: float | None = norm.momentum
    if norm.num_batches_tracked is None:
        return 0.0 if momentum is None else momentum
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum


class _Activation(torch.autograd.Function):
    """`_activate` with its gradient in C; second derivatives go through torch's operators."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, *weights, _, _, statistics, norm = arguments
        found = _activate(*arguments)
        ctx.statistics, ctx.epsilon = statistics, norm.eps
        mean, variance = found.mean, found.variance
        if statistics == GIVEN:  # the norm's own, which may take note of a batch before the backward pass
            mean, variance = mean.clone(), variance.clone()
        ctx.save_for_backward(x, *weights, mean, variance, found.pooled, found.raw, found.hidden)
        return found.hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *learnt, mean, variance, pooled, raw, hidden = ctx.saved_tensors
        needed = ctx.needs_input_grad[:LEARNT]
        nothing = [None] * (len(ctx.needs_input_grad) - LEARNT)
        if reference.differentiates(gradient):
            given = (mean, variance) if ctx.statistics == GIVEN else None
            activate = partial(
                reference.activate, given=given, epsilon=ctx.epsilon, by_sample=ctx.statistics == OF_SAMPLE
            )
            return (*reference.differentiate(activate, learnt, gradient, needed), *nothing)
        x, reduce, _, scale, _ = learnt
        found = Activated(pooled, hidden, raw, mean, variance)
        told = gradient, found, reduce, scale, ctx.epsilon
        if activating.activates(pooled):
            gradients = activating.differentiate_activations(*told, given=ctx.statistics == GIVEN, needed=needed)
        else:
            positions = x.shape[2] if x.dim() == 3 else 1
            gradients = native.differentiate_activations(*told, ctx.statistics, positions, needed)
        of_x, *others = gradients
        if of_x is not None and x.dim() == 3:
            # A view, no map: autograd adds it to the layer's gradient in place.
            of_x = of_x.unsqueeze(2).expand(x.shape)
        return (of_x, *others, *nothing)


def statistics_of(norm: nn.Module, batch: int) -> int:
    """Return whose mean and variance an attention's norm takes of so many samples."""
    if type(norm) is nn.LayerNorm:
        return OF_SAMPLE
    return OF_BATCH if norm.training and batch > 1 else GIVEN


def is_watched() -> bool:
    """Return whether a graph is made, a transform is at work, or something looks at every operator."""
    return is_recorded() or needs_alpha("auto") or torch._C._len_torch_dispatch_stack() > 0
