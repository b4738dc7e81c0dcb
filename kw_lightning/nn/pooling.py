"""Max pooling in evaluation of maps whose channels come first: a maximum for each dimension, which is the same numbers.

PyTorch's own goes there from window to window, a number at a time, and notes where each came from: six times the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from kw_lightning.nn.precision import is_unheard

DIMENSIONS: dict[type[nn.Module], int] = {nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def is_max_pool(module: nn.Module | None) -> bool:
    """Return whether it is a max pooling that gives maxima alone."""
    return type(module) in DIMENSIONS and not module.return_indices  # type: ignore[union-attr]


def is_untold(pool: nn.Module) -> bool:
    """Return whether nothing is told of what a pooling is called with."""
    return is_unheard(pool) and not has_any_global_hook()


def max_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Return what a max pooling gives for x, in plain evaluation.

    Args:
        pool: one that `is_max_pool` knew, by now perhaps another.
        x: [batch, channels, *size].
    """
    sides = None if torch.compiler.is_compiling() else _sides(pool, x)
    if sides is None:
        return pool(x)  # type: ignore[no-any-return]
    for dimension, side in enumerate(sides, 2):
        x = _maxima(x, dimension, *side)
    return x


def _sides(pool: nn.Module, x: Tensor) -> list[tuple[int, int, int]] | None:
    """Return kernel size, stride and padding of each dimension; None where the pooling is to do it itself."""
    dimensions = DIMENSIONS.get(type(pool), 0)
    if not (is_max_pool(pool) and is_untold(pool)) or pool.ceil_mode or x.dim() != dimensions + 2:
        return None
    if not (x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and x.numel()):
        return None
    numbers = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    found = [(each,) * dimensions if isinstance(each, int) else tuple(each) for each in numbers]  # type: ignore[arg-type]
    for size, kernel, padding, dilation in zip(x.shape[2:], found[0], found[2], found[3], strict=True):
        # The position at which a window's padding ends is there for every window.
        if dilation != 1 or not 0 <= 2 * padding < kernel or not 1 < kernel <= size + 2 * padding:
            return None
    return list(zip(*found[:3], strict=True))


def _maxima(x: Tensor, dimension: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Return the maxima of windows along one dimension, a position of all windows at a time."""
    size = x.shape[dimension]
    windows = (size + 2 * padding - kernel) // stride + 1
    taken: list[tuple[int, int, Tensor]] = []  # of each position, the windows in which it is a number, and these
    for position in range(-padding, kernel - padding):
        first, last = max(-(position // stride), 0), min((size - 1 - position) // stride + 1, windows)
        if first < last:
            start = first * stride + position
            taken.append((first, last, _cut(x, dimension, start, start + (last - first - 1) * stride + 1, stride)))
    taken.sort(key=lambda each: each[0] - each[1])
    (*_, whole), *others = taken
    y = x.new_empty(whole.shape)
    if others and others[0][1] - others[0][0] == windows:
        torch.maximum(whole, others.pop(0)[2], out=y)
    else:
        y.copy_(whole)
    for first, last, numbers in others:
        part = _cut(y, dimension, first, last, 1)
        torch.maximum(part, numbers, out=part)
    return y


def _cut(x: Tensor, dimension: int, start: int, stop: int, step: int) -> Tensor:
    return x[(*[slice(None)] * dimension, slice(start, stop, step))]
