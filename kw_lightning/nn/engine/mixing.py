"""The linear mixtures themselves as matrix products: W = α·E, and the gradients dα = dW·Eᵀ and dE = αᵀ·dW.

α of a chunk of samples is one matrix [samples · mixtures, cells], and a range of the cells' rows one matrix
[cells, columns] without copying. Mixing has few terms a sum (n, often under 100): what bounds it is the traffic of W.
So on the CPU it runs in blocks of columns whose kernels stay in the cache until they are used.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Columns a product on the CPU: measured best of 1,024 … 262,144 (135 GFLOP/s against 52 for one product of 262,144).
BLOCK_COLUMNS = 16_384


def mix(attention: Tensor, cells: Tensor, out: Tensor) -> None:
    """Write α·E.

    Args:
        attention: α [rows, cells].
        cells: E [cells, columns], its rows contiguous.
        out: [rows, columns].
    """
    for block in _blocks(cells):
        torch.mm(attention, cells[:, block], out=out[:, block])


def attention_gradient(kernels: Tensor, cells: Tensor, total: Tensor) -> None:
    """Add dW·Eᵀ to dα.

    Args:
        kernels: dW [rows, columns].
        cells: E [cells, columns].
        total: dα [rows, cells], of at least single precision.
    """
    # Products are fastest where a row of the result fills whole registers: an odd number of cells goes the other way.
    if cells.shape[0] % 16:
        part = total.new_zeros(total.shape[1], total.shape[0])
        _add_products(((cells[:, block], kernels[:, block].t()) for block in _blocks(cells)), part)
        total += part.t()
    else:
        _add_products(((kernels[:, block], cells[:, block].t()) for block in _blocks(cells)), total)


def cells_gradient(attention: Tensor, kernels: Tensor, total: Tensor, *, first: bool) -> None:
    """Write, the first time, or add αᵀ·dW to dE.

    Args:
        attention: α [rows, cells].
        kernels: dW [rows, columns].
        total: dE [cells, columns], of at least single precision.
    """
    for block in _blocks(kernels):
        if not first:
            _add_products([(attention.t(), kernels[:, block])], total[:, block])
        elif total.dtype == kernels.dtype:
            torch.mm(attention.t(), kernels[:, block], out=total[:, block])
        else:
            total[:, block] = torch.mm(attention.t(), kernels[:, block])


def _add_products(pairs: Iterable[tuple[Tensor, Tensor]], total: Tensor) -> None:
    for a, b in pairs:
        if total.dtype == a.dtype:
            total.addmm_(a, b)
        else:
            total += torch.mm(a, b)


def _blocks(matrix: Tensor) -> list[slice]:
    columns = matrix.shape[1]
    step = BLOCK_COLUMNS if matrix.device.type == "cpu" else max(columns, 1)
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
