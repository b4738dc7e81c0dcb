"""Compares the path of Triton, interpreted on the CPU, with the literal form; prints a line of JSON a case.

Interpreted, which TRITON_INTERPRET=1 asks for, has to be decided before Triton is imported: so in a process of its own.
"""

from __future__ import annotations

import copy
import json
import math

import torch
from torch import Tensor

from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import AttentionFactors, Convolution, computing, reference, workspace
from kw_lightning.nn.engine.factors import differentiate_alpha, make_alpha
from kw_lightning.nn.engine.paths import find_path
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.tiles import activating, weighing
from kw_lightning.nn.layer import KWLayer
from kw_lightning.nn.pooling import LARGEST_MEAN, pool

# (kernel [out, in, *size], cell, stride, padding, dilation, input size, batch, cells, type, bytes of a chunk, last)
CASES = {
    "2 × 2 in several tiles": ((20, 80, 2, 2), (20, 40, 1, 1), (1, 1), (1, 1), (1, 1), (9, 8), 2, 5),
    "2 × 2 in whole tiles": ((16, 32, 2, 2), (16, 16, 1, 1), (1, 1), (1, 1), (1, 1), (9, 8), 1, 4),
    "2 × 2 on a map of one tile": ((20, 144, 2, 2), (20, 72, 1, 1), (1, 1), (1, 1), (1, 1), (5, 4), 2, 5),
    "1 × 1": ((40, 24, 1, 1), (8, 24, 1, 1), (1, 1), (0, 0), (1, 1), (5, 7), 2, 9),
    "1 × 1 with a stride, positions that nothing reads": (
        (16, 16, 1, 1),
        (16, 16, 1, 1),
        (2, 2),
        (0, 0),
        (1, 1),
        (6, 7),
        3,
        4,
    ),
    "7 × 7 with a stride": ((8, 3, 7, 7), (8, 3, 1, 1), (2, 2), (3, 3), (1, 1), (5, 4), 1, 3),
    "two strides, padding and dilation": ((16, 32, 3, 2), (16, 8, 1, 1), (3, 2), (2, 1), (2, 1), (7, 6), 1, 8),
    "stride and dilation with a common divisor": ((8, 8, 3, 3), (4, 8, 1, 1), (4, 2), (2, 2), (2, 2), (5, 5), 1, 4),
    "whole cells": ((12, 8, 2, 3), (6, 4, 2, 3), (2, 1), (1, 1), (1, 1), (6, 5), 1, 5),
    "tokens": ((20, 16, 1), (10, 16, 1), (1,), (0,), (1,), (13,), 2, 7),
    "one dimension": ((8, 4, 5), (4, 4, 1), (2,), (2,), (1,), (17,), 3, 4),
    "a map smaller than the kernel": ((4, 6, 3, 3), (2, 3, 1, 1), (1, 1), (1, 1), (1, 1), (1, 2), 2, 3),
    "depthwise with a stride, two cells": ((24, 1, 3, 3), (12, 1, 1, 1), (2, 1), (1, 1), (1, 1), (6, 7), 2, 5),
    "depthwise, whole cells": ((72, 1, 3, 3), (8, 1, 3, 3), (1, 2), (2, 1), (2, 1), (9, 8), 2, 4),
    "depthwise, one dimension, single channels": ((6, 1, 5), (1, 1, 1), (1,), (2,), (1,), (11,), 2, 3),
    "33 samples": ((4, 4, 1, 1), (4, 4, 1, 1), (1, 1), (0, 0), (1, 1), (3, 3), 33, 2),
    "one sample": ((4, 4, 2, 2), (4, 4, 1, 1), (1, 1), (1, 1), (1, 1), (5, 5), 1, 2),
    "no sample": ((4, 4, 3, 3), (4, 4, 1, 1), (1, 1), (1, 1), (1, 1), (5, 5), 0, 2),
}


def errors(case: str, dtype: torch.dtype, limit: int | None, *, last: bool) -> dict[str, float]:
    """Return how far output and gradients are from the literal form in float64, relative to its largest number."""
    kernel, cell, stride, padding, dilation, size, batch, cells = CASES[case]
    groups = kernel[0] if case.startswith("depthwise") else 1
    convolution = Convolution(kernel, cell, stride, padding, dilation, groups)
    path = find_path("mix_kernels/triton")
    assert path is not None
    assert path.refusal(Problem(convolution, batch, size, cells, dtype, torch.device("cpu"))) is None
    torch.manual_seed(0)
    mixtures = math.prod(kernel) // math.prod(cell)
    shapes = (batch, kernel[1] * groups, *size), (batch, mixtures, cells), (cells, *cell)
    x, attention, stored = (torch.randn(shape).to(dtype) for shape in shapes)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    exact = [tensor.double().requires_grad_() for tensor in (x, attention, stored)]
    expected = reference.convolve(*exact, convolution)
    gradient = torch.randn(expected.shape).to(dtype)
    wanted = expected, *torch.autograd.grad(expected, exact, gradient.double())
    with workspace(limit):
        y = computing.forward(x, attention, stored, convolution, path)
        found = computing.backward(gradient, x, attention, stored, convolution, path, [True] * 3)
    for image in (y, found[0]):
        assert (image.movedim(1, -1) if last and x.dim() == 4 else image).is_contiguous()
    pairs = zip(("y", "x", "attention", "cells"), (y, *found), wanted, strict=True)
    return {
        name: float((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3)) if other.numel() else 0.0
        for name, one, other in pairs
        if one.shape == other.shape
    }


def errors_of_weights(batch: int, cells: int, tau: float) -> dict[str, float]:
    """Return how far α and the gradients of its factors are from torch's operators in float64."""
    torch.manual_seed(0)
    mixtures, width = 3, 5
    columns = mixtures * (cells + 1)
    tensors = torch.randn(batch, width), torch.randn(columns, width), torch.randn(columns), torch.tensor(tau)
    tensors[1][3], tensors[2][3] = 0, 0  # z that is 0, whose absolute value has no slope
    initial = torch.tensor([0, cells - 1, cells])
    found = AttentionFactors(*tensors, initial)
    exact = AttentionFactors(*(tensor.double() for tensor in tensors), initial)
    assert weighing.weighs(found.hidden, cells + 1)
    gradient = torch.randn(batch, mixtures, cells + 2)[..., :cells]  # of wider rows
    wanted = exact.alpha(), *differentiate_alpha(exact, gradient.double())
    half = make_alpha(found, torch.float16, 8)
    assert half.shape[-1] % 8 == 0
    assert not half[..., cells:].any()
    assert torch.equal(half[..., :cells], make_alpha(found).half())
    pairs = zip((make_alpha(found), *differentiate_alpha(found, gradient)), wanted, strict=True)
    names = ("y", "x", "attention", "cells")
    return {
        name: float((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3))
        for name, (one, other) in zip(names, pairs, strict=True)
    }


def errors_of_layer(layer: KWLayer, x: Tensor) -> dict[str, float]:
    """Return how far a layer with its attention is from the literal form in float64, x's means pooled beside it."""
    share_warehouse([layer], budget=2)
    set_temperature(layer, 0.25)
    exact = copy.deepcopy(layer).double()
    exact.engine = "reference"
    assert pool(x.requires_grad_(), channels_last=layer.channels_last)[1] is not None
    one, other = x, x.detach().double().requires_grad_()
    found = []
    for net, images in ((layer, one), (exact, other)):
        y = net(images)
        y.square().mean().backward()
        found.append((y.detach(), images.grad, net.attention.reduce.weight.grad, net.warehouse.cells.grad))
    return {
        name: float((first.double() - second).abs().max() / second.abs().max())
        for name, first, second in zip(("y", "x", "attention", "cells"), *found, strict=True)
        if first.shape == second.shape
    }


def errors_of_norm(batch: int, *, training: bool) -> dict[str, float]:
    """Return how far an attention's hidden activations and their gradients are from torch's operators in float64."""
    torch.manual_seed(0)
    layer = KWConv2d(20 * 16, 6, 3)
    share_warehouse([layer], budget=1)
    made = layer.attention.train(training)
    with torch.no_grad():
        for tensor in (made.norm.weight, made.norm.bias, made.norm.running_mean, made.norm.running_var):
            tensor.uniform_(0.5, 1.5)
    exact = copy.deepcopy(made).double()
    means = torch.randn(batch, 20 * 16)
    one, other = means.clone().requires_grad_(), means.double().requires_grad_()
    assert activating.activates(one)
    versions = [buffer._version for buffer in made.norm.buffers()]
    hidden, expected = made._hidden(one), exact._by_modules(other)
    for buffer, wanted, version in zip(made.norm.buffers(), exact.norm.buffers(), versions, strict=True):
        torch.testing.assert_close(buffer.to(wanted.dtype), wanted, rtol=1e-6, atol=1e-6)
        assert (buffer._version > version) == training
    gradient = torch.randn(hidden.shape)
    hidden.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(made.norm.bias.grad.double(), exact.norm.bias.grad, rtol=1e-5, atol=1e-5)
    found = (hidden.detach(), one.grad, made.reduce.weight.grad, made.norm.weight.grad)
    wanted = (expected.detach(), other.grad, exact.reduce.weight.grad, exact.norm.weight.grad)
    return {
        name: float((first.double() - second).abs().max() / second.abs().max())
        for name, first, second in zip(("y", "x", "attention", "cells"), found, wanted, strict=True)
    }


def check_reach() -> None:
    """Check that means of half precision out of reach are finite, and have no gradient."""
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last).to(torch.bfloat16)
    x[0, 0], x[1, 1] = 3e38, 1e20
    again, means = pool(x.requires_grad_(), channels_last=False)
    assert means[0, 0] == means[1, 1] == LARGEST_MEAN
    (gradient,) = torch.autograd.grad((again * 2).sum() + 9 * means.sum(), x)
    wanted = torch.full_like(x, 3)
    wanted[0, 0], wanted[1, 1] = 2, 2
    assert torch.equal(gradient, wanted)


def main() -> None:
    check_reach()
    for batch, training in ((1, False), (70, False), (5, True), (130, True)):
        case = f"hidden activations of {batch} samples" + " in training" * training
        print(json.dumps([case, "float32", errors_of_norm(batch, training=training)]), flush=True)
    for batch, cells, tau in ((1, 1, 0.0), (2, 40, 0.3), (3, 7, 1.0)):
        name = f"α of {cells} cells at τ = {tau}"
        print(json.dumps([name, "float32", errors_of_weights(batch, cells, tau)]), flush=True)
    images = torch.randn(3, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    layers = (
        ("a layer", KWConv2d(8, 6, 3, padding=1), images),
        ("a linear layer", KWLinear(8, 6), torch.randn(3, 5, 8)),
    )
    for case, layer, x in layers:
        print(json.dumps([case, "float32", errors_of_layer(layer, x)]), flush=True)
    for case in CASES:
        print(json.dumps([case, "float32", errors(case, torch.float32, None, last=True)]), flush=True)
    case = next(iter(CASES))
    print(json.dumps([case, "float16", errors(case, torch.float16, None, last=True)]))
    print(json.dumps([case + " in chunks", "float32", errors(case, torch.float32, 20_000, last=False)]))


if __name__ == "__main__":
    main()
