"""The compiled weighing of cells against torch's operators in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kw_lightning.nn.engine import AttentionFactors, native
from kw_lightning.nn.engine.factors import differentiate_alpha, differentiate_sizes, make_alpha, make_sizes

WIDTH, MIXTURES = 5, 7

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")


def make(batch: int, cells: int, tau: float, dtype: torch.dtype) -> AttentionFactors:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # z of such numbers is exact in both types, and so are its signs.
        return torch.randn(shape, generator=generator).mul(64).round().div(64).to(dtype)

    columns = MIXTURES * (cells + 1)
    weight, bias = draw(columns, WIDTH), draw(columns)
    weight[3], bias[3] = 0, 0  # z that is 0, whose absolute value has no slope
    initial = torch.arange(MIXTURES) % (cells + 1)
    return AttentionFactors(draw(batch, WIDTH), weight, bias, torch.tensor(tau, dtype=dtype), initial)


@pytest.mark.parametrize(("batch", "cells"), [(0, 4), (1, 1), (2, 15), (33, 300)])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_weights_and_gradients_are_those_of_double_precision(batch: int, cells: int, tau: float) -> None:
    found, exact = (make(batch, cells, tau, dtype) for dtype in (torch.float32, torch.float64))
    assert native.weighs(found.hidden)
    alpha = exact.alpha()
    torch.testing.assert_close(make_alpha(found).double(), alpha, rtol=0, atol=1e-6)
    gradient = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(1))
    gradients = differentiate_alpha(found, gradient), differentiate_alpha(exact, gradient.double())
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "cells"), [(0, 4), (1, 1), (2, 15), (33, 300)])
def test_sizes_and_gradients_are_those_of_double_precision(batch: int, cells: int) -> None:
    found, exact = (make(batch, cells, 0.3, dtype) for dtype in (torch.float32, torch.float64))
    sizes = make_sizes(exact)
    torch.testing.assert_close(make_sizes(found).double(), sizes, rtol=1e-6, atol=0)
    gradient = torch.randn(sizes.shape, generator=torch.Generator().manual_seed(1))
    gradients = differentiate_sizes(found, gradient), differentiate_sizes(exact, gradient.double())
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        # Sums of up to 2,107 numbers about 1, which partly cancel.
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)
