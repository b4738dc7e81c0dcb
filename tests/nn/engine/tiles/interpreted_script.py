"""Compares the path of Triton, interpreted on the CPU, with the literal form; prints a line of JSON a case.

Interpreted, which TRITON_INTERPRET=1 asks for, has to be decided before Triton is imported: so in a process of its own.
"""

from __future__ import annotations

import json
import math

import torch

from kw_lightning.nn.engine import AttentionFactors, Convolution, computing, reference, workspace
from kw_lightning.nn.engine.factors import differentiate_alpha, make_alpha
from kw_lightning.nn.engine.paths import find_path
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.tiles import weighing

# (kernel [out, in, *size], cell, stride, padding, dilation, input size, batch, cells, type, bytes of a chunk, last)
CASES = {
    "2 × 2 in several tiles": ((20, 80, 2, 2), (20, 40, 1, 1), (1, 1), (1, 1), (1, 1), (9, 8), 2, 5),
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
    assert weighing.weighs(found.z(found.hidden))
    gradient = torch.randn(batch, mixtures, cells + 2)[..., :cells]  # of wider rows
    wanted = exact.alpha(), *differentiate_alpha(exact, gradient.double())
    pairs = zip((make_alpha(found), *differentiate_alpha(found, gradient)), wanted, strict=True)
    names = ("y", "x", "attention", "cells")
    return {
        name: float((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-3))
        for name, (one, other) in zip(names, pairs, strict=True)
    }


def main() -> None:
    for batch, cells, tau in ((1, 1, 0.0), (2, 40, 0.3), (3, 7, 1.0)):
        name = f"α of {cells} cells at τ = {tau}"
        print(json.dumps([name, "float32", errors_of_weights(batch, cells, tau)]), flush=True)
    for case in CASES:
        print(json.dumps([case, "float32", errors(case, torch.float32, None, last=True)]), flush=True)
    case = next(iter(CASES))
    print(json.dumps([case, "float16", errors(case, torch.float16, None, last=True)]))
    print(json.dumps([case + " in chunks", "float32", errors(case, torch.float32, 20_000, last=False)]))


if __name__ == "__main__":
    main()
