"""The literal form: assemble every sample's kernel, then convolve the batch as one grouped convolution.

The yardstick of tests and benchmarks. Paper: KernelWarehouse (ICML 2024), equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine.convolution import Convolution


def assemble_kernels(attention: Tensor, cells: Tensor, convolution: Convolution) -> Tensor:
    """Return every sample's kernel, W[og·co + a, ig·ci + c, position] = Σ_j α[(position, og, ig), j] · E[j, a, c].

    Args:
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].

    Returns:
        [batch, out_channels, in_channels / groups, *kernel_size].
    """
    return join_mixtures(torch.einsum("bmn,n...->bm...", attention, cells), convolution)


def join_mixtures(mixed: Tensor, convolution: Convolution) -> Tensor:
    """Return mixtures [batch, mixtures, co, ci, *ck] as kernels [batch, *kernel_shape]; a view where one will do."""
    spatial, out_groups, in_groups = convolution.grid
    # [batch, *spatial, out_groups, in_groups, co, ci, *ck], the mixtures' order being spatial, output, input.
    mixed = mixed.unflatten(1, (*spatial, out_groups, in_groups))
    return mixed.permute(_kernel_order(len(spatial))).reshape(-1, *convolution.kernel_shape)


def split_kernels(kernels: Tensor, convolution: Convolution) -> Tensor:
    """Return kernels [batch, *kernel_shape] as mixtures [batch, mixtures, co, ci, *ck]: inverts `join_mixtures`."""
    spatial, out_groups, in_groups = convolution.grid
    cell_out, cell_in, *cell_size = convolution.cell_shape
    sides = [side for pair in zip(spatial, cell_size, strict=True) for side in pair]
    blocks = kernels.reshape(-1, out_groups, cell_out, in_groups, cell_in, *sides)
    order = _kernel_order(len(spatial))
    blocks = blocks.permute([order.index(dimension) for dimension in range(len(order))])
    return blocks.reshape(kernels.shape[0], -1, *convolution.cell_shape)


def _kernel_order(dimensions: int) -> list[int]:
    out_group, in_group = 1 + dimensions, 2 + dimensions
    order = [0, out_group, out_group + 2, in_group, in_group + 2]
    for dimension in range(dimensions):
        order += [1 + dimension, in_group + 3 + dimension]
    return order


def convolve(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> Tensor:
    """Convolve every sample with its own kernel.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].

    Returns:
        [batch, out_channels, *output size].
    """
    batch = x.shape[0]
    kernels = assemble_kernels(attention, cells, convolution)
    function = (F.conv1d, F.conv2d, F.conv3d)[convolution.dimensions - 1]
    geometry = convolution.stride, convolution.padding, convolution.dilation
    if not batch:  # there is no convolution of no groups; the sum of no kernels, which is zero, takes gradients as well
        empty: Tensor = function(x, kernels.sum(0), None, *geometry, convolution.groups)
        return empty
    y = function(
        x.reshape(1, batch * x.shape[1], *x.shape[2:]),
        kernels.flatten(0, 1),
        None,
        *geometry,
        batch * convolution.groups,
    )
    return y.reshape(batch, convolution.kernel_shape[0], *y.shape[2:])


def apply_linear(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> Tensor:
    """Multiply every sample's tokens by its own matrix.

    Args:
        x: [batch, tokens, in_features].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci].

    Returns:
        [batch, tokens, out_features].
    """
    return torch.bmm(x, assemble_kernels(attention, cells, convolution).transpose(1, 2))


def activate(
    x: Tensor,
    reduce: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    given: tuple[Tensor, Tensor] | None,
    epsilon: float,
    *,
    by_sample: bool,
) -> Tensor:
    """Return an attention's hidden activations [batch, width].

    Args:
        x: [batch, channels, positions], **or** its means [batch, channels].
        reduce, bias: of the linear layer, [width, channels] and [width].
        scale, shift: of the norm, [width].
        given: the norm's mean and variance, None if it takes the batch's, or the sample's.
        epsilon: of the norm.
        by_sample: it normalises every sample by itself.
    """
    means = x if x.dim() == 2 else x.sum(2) / max(x.shape[2], 1)
    raw = F.linear(means, reduce, bias)
    if by_sample:
        return F.relu(F.layer_norm(raw, scale.shape, scale, shift, epsilon))
    mean, variance = (None, None) if given is None else given
    return F.relu(F.batch_norm(raw, mean, variance, scale, shift, given is None, eps=epsilon))


def differentiates(gradient: Tensor) -> bool:
    """Return whether an output's gradient must go through `differentiate`.

    It must if the results will be differentiated again, **or** if it is a batch of gradients, as by autograd's
    `is_grads_batched`: such a tensor has no memory that C could read.
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def differentiate(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of a literal form's inputs, which can be differentiated again if gradients are enabled.

    Args:
        function: the form, a function of these tensors.
        tensors: its inputs; some may depend on others, as the hidden activations do on x.
        gradient: of the output.
        needed: for each tensor, whether to compute its gradient; the others' are None.
    """
    # Views, none of which depends on another: this form's gradients must not flow from one of its inputs to the next.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        wanted = [tensor for tensor, need in zip(own, needed, strict=True) if tensor is not None and need]
        found = iter(torch.autograd.grad(function(*own), wanted, gradient, create_graph=again))
    return [next(found) if need else None for need in needed]
