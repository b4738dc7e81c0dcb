"""The operator of evaluation with what becomes of the output, as torch.compile calls it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kw_lightning.nn.engine import AttentionFactors, Convolution, Epilogue, Norm, finished, reference

DENSE = Convolution((12, 10, 3, 3), (6, 5, 1, 1), (2, 1), (1, 1), (1, 1))
CELLS, WIDTH = 4, 3


def make(batch: int, *, factored: bool) -> tuple[Tensor, Tensor | AttentionFactors, Tensor]:
    """Return (x, attention, cells) in float32."""
    generator = torch.Generator().manual_seed(0)
    x, cells = torch.randn(batch, 10, 6, 5, generator=generator), torch.randn(CELLS, 6, 5, 1, 1, generator=generator)
    mixtures = 36
    if not factored:
        return x, torch.randn(batch, mixtures, CELLS, generator=generator), cells
    columns = mixtures * (CELLS + 1)
    shapes = (batch, WIDTH), (columns, WIDTH), (columns,)
    last = [torch.randn(shape, generator=generator) for shape in shapes]
    return x, AttentionFactors(*last, torch.tensor(0.25), torch.arange(mixtures) % CELLS, lasting=True), cells


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
@pytest.mark.parametrize("factored", [False, True])
def test_it_computes_what_the_literal_form_and_operators_afterwards_do(batch: int, factored: bool) -> None:
    x, attention, cells = make(batch, factored=factored)
    alpha = attention if isinstance(attention, Tensor) else attention.alpha()
    plain = reference.convolve(x, alpha, cells, DENSE)
    ones = torch.ones(12)
    norm = Norm(0.5 * ones, 4 * ones, 3 * ones, None, 1e-6)  # 0 is refused by torch 2.11
    for last in (False, True):
        format = torch.channels_last if last else torch.contiguous_format
        added = torch.randn_like(plain)
        epilogues = {
            Epilogue(): plain,
            Epilogue(bias=ones, activation="relu"): (plain + 1).relu(),
            Epilogue(scale=2 * ones, norm=norm, added=added): (2 * plain - 0.5) / 2 * 3 + added,
        }
        with torch.no_grad():
            for epilogue, expected in epilogues.items():
                y = finished.call(x.contiguous(memory_format=format), attention, cells, DENSE, "auto", epilogue)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factored", [False, True])
def test_it_keeps_pytorchs_rules(factored: bool) -> None:
    x, attention, cells = make(2, factored=factored)
    tensors = [attention] if isinstance(attention, Tensor) else list(vars(attention).values())[:-1]
    norm = [None, torch.ones(12), torch.zeros(12), torch.ones(12), None, None]
    arguments = x, tensors, cells, DENSE.numbers, "auto", False, norm, 1e-5, None, "relu"
    checks = ("test_schema", "test_faketensor")  # it has no gradient
    results = torch.library.opcheck(torch.ops.kw_lightning.finished_convolution, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
