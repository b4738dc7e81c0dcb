"""The mixing products: blocks of columns, precision of the sums."""

from __future__ import annotations

import pytest
import torch

from kw_lightning.nn.engine import Convolution, dynamic_convolution, mixing, reference
from kw_lightning.nn.engine.paths import PATHS
from kw_lightning.nn.engine.problem import Problem


@pytest.mark.parametrize("cells", [7, 32])
@pytest.mark.parametrize("columns", [1, 100, 4096, 5000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_in_blocks_equal_whole_ones(cells: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)
    limit = 1e-12 if dtype == torch.float64 else 2e-2
    attention = torch.randn(12, cells).to(dtype)
    # Rows of a larger matrix, as a range of the cells' rows is.
    stored = torch.randn(cells, columns + 3).to(dtype)[:, :columns]
    kernels = torch.empty(12, columns, dtype=dtype)
    mixing.mix(attention, stored, kernels)
    expected = attention.double() @ stored.double()
    assert (kernels.double() - expected).abs().max() < limit * expected.abs().max()

    total = torch.ones(12, cells, dtype=exact)
    mixing.attention_gradient(kernels, stored, total)
    expected = 1 + kernels.double() @ stored.double().t()
    assert (total.double() - expected).abs().max() < limit * expected.abs().max()

    total = torch.full((cells, columns), torch.nan, dtype=exact)
    for first in (True, False):
        mixing.cells_gradient(attention, kernels, total, first=first)
    expected = 2 * attention.double().t() @ kernels.double()
    assert (total.double() - expected).abs().max() < limit * expected.abs().max()


def test_tensors_in_any_memory_order_are_taken() -> None:
    geometry = Convolution((4, 6, 3, 3), (4, 3, 1, 1), (1, 1), (1, 1), (1, 1))
    torch.manual_seed(0)
    x = torch.randn(5, 5, 6, 2, dtype=torch.float64).permute(3, 2, 0, 1).requires_grad_()
    attention = torch.randn(7, 18, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    cells = torch.randn(3, 4, 7, 1, 1, dtype=torch.float64).permute(2, 1, 0, 3, 4).requires_grad_()
    expected = reference.convolve(x, attention, cells, geometry)
    gradient = torch.randn(5, 5, 4, 2, dtype=torch.float64).permute(3, 2, 0, 1)
    wanted = torch.autograd.grad(expected, (x, attention, cells), gradient)
    problem = Problem.of(x, attention, cells, geometry, backward=True)
    able = [path.name for path in PATHS if path.refusal(problem) is None]
    assert len(able) > 5
    for engine in able:
        y = _by_path(x, attention, cells, geometry, engine)
        torch.testing.assert_close(y, expected)
        for one, other in zip(torch.autograd.grad(y, (x, attention, cells), gradient), wanted, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(dynamic_convolution(x, attention, cells, geometry), expected)


def _by_path(
    x: torch.Tensor, attention: torch.Tensor, cells: torch.Tensor, geometry: Convolution, path: str
) -> torch.Tensor:
    from kw_lightning.nn.engine.operators import dynamic_convolution as operator

    return operator(x, attention, cells, geometry.numbers, path)
