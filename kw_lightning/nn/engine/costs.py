"""The time that a path takes: its load, counted from shapes alone, times seconds per unit of it.

On a CPU the seconds are fitted (non-negative least squares on relative errors) to the times of every path on 105 dense
convolutions: of ResNet18 and 50, MobileNetV2 and ConvNeXt, maps of 56² to 1², batches of 1 to 64, budgets 1/4 to 4; two
cores with AVX2, float32. The fit misses a time by a tenth in the median and by a third in the worst tenth; of 210
choices 208 were within 1.25 times of the fastest path, the others, on maps of 3² and 7², 1.3 and 1.5 times as slow.
recipes/studies/engine_costs.py repeats it; the units stand with each path. Forward, bases and paths that mix inputs or
outputs are fitted anew to 283 problems, of kept bases and of single samples with hundreds of large cells too, between
what AVX2 and AVX-512 take with two threads: the choices together take 1.02 times the time of the fastest paths on both.
On a processor with AVX-512, where all units are two to three times too long, those of backward passes take 1.04 times
that of the fastest (one thread, before the gradients of 1×1 layers took a pass of their own).

On a GPU they are fitted likewise, in bfloat16 on an NVIDIA H200: to 71 problems of ResNet18 and 50 and MobileNetV2 at
224², batches of 256 and 32, of each the times of the fastest four paths. The choices together take 1.02 times the time
of the fastest paths forward, 1.01 times backward, and the same in a second run of 52 of them by all paths.
`engine: autotune` measures instead, as it should where the GPU is another, or the type float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# How many times as long a multiply-add takes a GPU in float32, without tensor cores, as in the 16-bit types that the
# units are fitted to: by published bounds, not measured.
FULL_PRECISION = 15.0


@dataclass(frozen=True)
class Load:
    """The work of one forward pass by a path; that of a backward pass is two to three times as much.

    Attributes:
        mixing: multiply-adds of the linear mixtures.
        products: multiply-adds of the convolution or of the dense products.
        elements: numbers moved; on a CPU those between maps, kernels and buffers outside of products, whose operands
            stay in the cache; on a GPU every operand and every result.
        calls: of PyTorch's products and copies; on a GPU launches of operators.
        slower: how many times as long multiply-adds of `mixing` and of `products` take as those of wide products.
    """

    mixing: float
    products: float
    elements: float
    calls: float
    slower: tuple[float, float] = (1.0, 1.0)


class Units(NamedTuple):
    """Seconds per unit of a load, in its order, and seconds that each pass takes in addition."""

    mixing: float
    products: float
    elements: float
    calls: float
    passes: float


class Fitted(NamedTuple):
    """The units of a path on one kind of device, as the study prints them."""

    forward: Units
    backward: Units


def amounts(load: Load) -> Units:
    """Return how much of each unit a pass takes: its seconds are the sum of these times the units."""
    mixing, products = load.slower
    return Units(load.mixing * mixing, load.products * products, load.elements, load.calls, 1.0)


def cpu_seconds(load: Load, fitted: Fitted, *, backward: bool) -> float:
    """Return about how long a pass takes on a CPU."""
    return _seconds(amounts(load), fitted.backward if backward else fitted.forward)


def gpu_seconds(load: Load, fitted: Fitted, dtype: torch.dtype, *, backward: bool) -> float:
    """Return about how long a pass takes on a GPU; its units are those of 16-bit types."""
    found = amounts(load)
    if dtype.itemsize > 2:
        found = Units(
            found.mixing * FULL_PRECISION,
            found.products * FULL_PRECISION,
            found.elements * dtype.itemsize / 2,
            found.calls,
            found.passes,
        )
    return _seconds(found, fitted.backward if backward else fitted.forward)


def _seconds(found: Units, units: Units) -> float:
    return sum(amount * unit for amount, unit in zip(found, units, strict=True))


def narrow(*sides: float) -> float:
    """Return how many times as long products with narrow operands take as those with wide ones."""
    return math.prod(1 + 16 / max(side, 1) for side in sides)
