"""The linear mixtures themselves as matrix products: W = α·E, and the gradients dα = dW·Eᵀ and dE = αᵀ·dW.

α of a chunk of samples is one matrix [samples · mixtures, cells], and a range of the cells' rows one matrix
[cells, columns] without copying. Its sums have few terms (n, often under 100), so mixing is bound by the memory traffic
of W. On the CPU it therefore runs in blocks of columns that stay in the cache until they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns per product on the CPU: measured best of 1,024 … 262,144 (135 GFLOP/s against 52 for one product of 262,144).
BLOCK_COLUMNS = 16_384
# Columns that one of the parallel products of dα takes.
DOT_COLUMNS = 2_048


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
    columns = cells.shape[1]
    step = DOT_COLUMNS if cells.device.type == "cpu" and columns >= 2 * DOT_COLUMNS else columns
    whole = columns - columns % step if step else 0
    # Products are fastest if rows of the result fill whole registers; otherwise the transpose is computed.
    a, b, place = (cells, kernels, total.t()) if cells.shape[0] % 16 else (kernels, cells, total)
    if whole > step:
        left, right = (matrix[:, :whole].view(len(matrix), -1, step).transpose(0, 1) for matrix in (a, b))
        place += torch.bmm(left, right.mT).sum(0, dtype=total.dtype)
    else:
        whole = 0
    if whole < columns:
        place += torch.mm(a[:, whole:], b[:, whole:].t())


def cells_gradient(attention: Tensor, kernels: Tensor, total: Tensor, *, first: bool) -> None:
    """Write αᵀ·dW to dE the first time, add it later.

    Args:
        attention: α [rows, cells].
        kernels: dW [rows, columns].
        total: dE [cells, columns], of at least single precision.
    """
    for block in _blocks(kernels):
        a, b, place = attention.t(), kernels[:, block], total[:, block]
        if total.dtype != kernels.dtype:
            product = torch.mm(a, b)
            place.copy_(product) if first else place.add_(product)
        elif first:
            torch.mm(a, b, out=place)
        else:
            place.addmm_(a, b)


def put_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Write the batched product to `total` the first time, add it later; `total` may be of higher precision."""
    if total.dtype != a.dtype:
        product = torch.bmm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.bmm(a, b, out=total)
    else:
        total.baddbmm_(a, b)


def _blocks(matrix: Tensor) -> list[slice]:
    columns = matrix.shape[1]
    step = BLOCK_COLUMNS if matrix.device.type == "cpu" else max(columns, 1)
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
