"""Starting the layers of a warehouse from static kernels.

Under a budget of 1 there are fewer cells than parts of kernels, and β gives some mixtures the zero cell. No choice of
cells helps those at τ = 1; at τ = 0 every mixture may draw on all cells. There the best n cells are known: the rows of
the kernels' parts [mixtures, cell numbers] projected on their n leading right singular vectors (Eckart and Young,
1936: no other n cells leave a smaller error, whatever the attention).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.layer import KWLayer, split_kernel
from kw_lightning.nn.weighing import LARGEST_SUM

SMALLEST = 1e-30  # size of kernels by which an error is divided


@torch.no_grad()
def load_kernels(layers: Sequence[KWLayer], kernels: Sequence[Tensor], temperature: float) -> float:
    """Start all layers of one warehouse from static kernels.

    At τ = 1 a budget of 1 or more gives every part of a kernel a cell of its own, and the layers compute what the
    static ones did; what happens while τ falls is left to training. At τ = 0 the attention starts at the weights of
    the best mixtures, alike for all samples, and no annealing is wanted. So it does where it has no start (β), which
    is where τ has no effect. A softmax over the cells of a single mixture has the kernel in each of them.

    Args:
        layers: all layers of a warehouse, in its order.
        kernels: their kernels, each [out_channels, in_channels / groups, *kernel_size].
        temperature: τ at which the layers are to have the kernels, 1 or 0; the warehouse gets it.

    Returns:
        The relative error of all kernels together, ‖lost‖ / ‖kernels‖; 0 where the budget is 1 or more.

    Raises:
        ValueError: at τ = 0, or without a start, another function of the attention than contrast.
    """
    warehouse, first = layers[0].warehouse, layers[0].attention
    assert warehouse is not None
    assert first is not None
    if temperature == 0 or not first.annealed:
        kernels = [_before_gates(layer, kernel) for layer, kernel in zip(layers, kernels, strict=True)]
    if first.function == "softmax" and warehouse.mixtures == 1:  # its weights add up to 1, whatever they are
        warehouse.set_temperature(temperature)
        warehouse.cells.copy_(_parts(layers[0], kernels[0].to(warehouse.cells)).view_as(warehouse.cells[:1]))
        return 0.0
    if temperature == 1 and first.annealed:
        errors = [layer.load_kernel(kernel) for layer, kernel in zip(layers, kernels, strict=True)]
        sizes = [float(torch.linalg.vector_norm(kernel)) for kernel in kernels]
        return math.hypot(*map(mul, errors, sizes)) / max(math.hypot(*sizes), SMALLEST)
    warehouse.set_temperature(temperature)
    cells = warehouse.cells
    if len(cells) >= warehouse.mixtures:
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.load_kernel(kernel / LARGEST_SUM)
            assert layer.attention is not None
            layer.attention.start_from(layer.attention.start * LARGEST_SUM)
        return 0.0
    parts = [_parts(layer, kernel.to(cells)) for layer, kernel in zip(layers, kernels, strict=True)]
    sizes = [len(part) for part in parts]
    wanted = torch.cat(parts).double()
    best, weights = best_cells(wanted, len(cells))
    cells.copy_(best.view_as(cells))
    for layer, start in zip(layers, weights.split(sizes), strict=True):
        assert layer.attention is not None
        layer.attention.start_from(start)
    return relative_error(wanted - weights @ best, wanted)


def best_cells(parts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the cells whose linear mixtures are nearest to the parts of kernels, and the mixtures' weights.

    Args:
        parts: [mixtures, numbers of a cell], in float64.
        count: n, how many cells.

    Returns:
        The cells [n, numbers of a cell], and weights [mixtures, n] with Σ_j |weight_ij| ≤ `LARGEST_SUM`, which the
        attention can give at τ = 0: cells are as large as that needs.
    """
    left, values, right = torch.linalg.svd(parts, full_matrices=False)
    rank = min(count, len(values))
    left, cells = left[:, :rank], values[:rank, None] * right[:rank]
    scale = left.abs().sum(dim=1).max().clamp_min(torch.finfo(left.dtype).tiny) / LARGEST_SUM
    unused = count - rank
    return F.pad(scale * cells, (0, 0, 0, unused)), F.pad(left / scale, (0, unused))


def relative_error(lost: Tensor, kernel: Tensor) -> float:
    """Return ‖lost‖ / ‖kernel‖, 0 for a kernel of zeros."""
    return float(torch.linalg.vector_norm(lost) / torch.linalg.vector_norm(kernel).clamp_min(SMALLEST))


def _before_gates(layer: KWLayer, kernel: Tensor) -> Tensor:
    """Start a layer's gates alike for all samples, and return the kernel that gives the wanted one behind them."""
    gates = None if layer.attention is None else layer.attention.gates
    return kernel if gates is None else kernel * gates.start_even()


def _parts(layer: KWLayer, kernel: Tensor) -> Tensor:
    assert layer.partition is not None
    return split_kernel(kernel, layer.partition).flatten(1)


__all__ = ["best_cells", "load_kernels", "relative_error"]
