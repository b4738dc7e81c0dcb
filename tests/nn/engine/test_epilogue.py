"""What becomes of an output: the same by every path as by torch's operators afterwards."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine import AttentionFactors, Convolution, bases, computing, factored, native, reference
from kw_lightning.nn.engine.epilogue import ACTIVATIONS, Epilogue, Norm
from kw_lightning.nn.engine.paths import PATHS
from kw_lightning.nn.engine.problem import Problem

DENSE = Convolution((21, 10, 3, 3), (7, 5, 1, 1), (1, 1), (1, 1), (1, 1))
POINTWISE = Convolution((21, 10, 1, 1), (7, 5, 1, 1), (1, 1), (0, 0), (1, 1))
GROUPED = Convolution((21, 4, 3, 3), (7, 4, 1, 1), (1, 1), (1, 1), (1, 1), 3)
DEPTHWISE = Convolution((21, 1, 3, 3), (7, 1, 1, 1), (2, 2), (1, 1), (1, 1), 21)
CELLS, SIZE = 4, (9, 10)  # more positions than are finished at once
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def tensors(convolution: Convolution, batch: int = 2, *, last: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixtures = convolution.kernel_shape[0] * convolution.kernel_shape[1] * convolution.kernel_shape[2] ** 2
    mixtures //= convolution.cell_shape[0] * convolution.cell_shape[1]
    x = torch.randn(batch, convolution.kernel_shape[1] * convolution.groups, *SIZE, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    attention = torch.randn(batch, mixtures, CELLS, generator=generator)
    return [x, attention, torch.randn(CELLS, *convolution.cell_shape, generator=generator)]


def epilogues(y: Tensor) -> list[Epilogue]:
    """Return an epilogue of every part alone, and of all together with each activation."""
    generator = torch.Generator().manual_seed(1)
    scale, bias, mean, weight, shift = (torch.randn(y.shape[1], generator=generator).to(y.dtype) for _ in range(5))
    norm = Norm(mean, torch.rand(y.shape[1], generator=generator).to(y.dtype) + 0.1, weight, shift, 1e-3)
    plain = replace(Epilogue(), norm=norm._replace(weight=None, bias=None))
    added = torch.randn(y.shape, generator=generator).to(y.dtype)
    parts = [Epilogue(scale=scale), Epilogue(bias=bias), plain, Epilogue(added=added)]
    whole = [Epilogue(scale, bias, norm, added, activation) for activation in (None, *ACTIVATIONS)]
    other = torch.channels_last if y.is_contiguous() else torch.contiguous_format
    return [*parts, *whole, replace(whole[1], added=added.contiguous(memory_format=other))]


def by_hand(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Return act(norm(y · scale + bias) + added) in double precision, each number by its formula."""
    scale, bias, mean, variance, weight, shift = (
        None if factor is None else factor.double().view(-1, 1, 1) for factor in epilogue.factors
    )
    y = y.double() if scale is None else y.double() * scale
    y = y if bias is None else y + bias
    if mean is not None and variance is not None and epilogue.norm is not None:
        y = (y - mean) / (variance + epilogue.norm.epsilon).sqrt() * (1 if weight is None else weight)
        y = y if shift is None else y + shift
    y = y if epilogue.added is None else y + epilogue.added.double()
    functions = {
        None: y,
        "relu": y.clamp_min(0),
        "relu6": y.clamp(0, 6),
        "hardswish": y * (y + 3).clamp(0, 6) / 6,
        "silu": y * y.sigmoid(),
    }
    return functions[epilogue.activation]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_path_finishes_its_output_as_operators_do_afterwards(path, dtype) -> None:  # type: ignore[no-untyped-def]
    tried = 0
    for convolution, last in itertools.product((DENSE, POINTWISE, GROUPED, DEPTHWISE), (False, True)):
        if path.refusal(Problem(convolution, 2, SIZE, CELLS, dtype, torch.device("cpu"))) is not None:
            continue
        x, attention, cells = (tensor.to(dtype) for tensor in tensors(convolution, last=last))
        expected = reference.convolve(x.double(), attention.double(), cells.double(), convolution)
        for epilogue in epilogues(computing.forward(x, attention, cells, convolution, path)):
            y = computing.forward(x, attention, cells, convolution, path, epilogue)
            assert y.dtype == dtype
            assert error(y, by_hand(expected, epilogue)) < TOLERANCE[dtype], (convolution, last, epilogue.activation)
            tried += 1
    if not tried:
        pytest.skip("computes none of the convolutions in this type here")


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_batches_are_finished_sample_by_sample(batch: int) -> None:
    x, attention, cells = tensors(DENSE, batch)
    for path in PATHS:
        if path.refusal(Problem(DENSE, batch, SIZE, CELLS, x.dtype, x.device)) is not None:
            continue
        plain = computing.forward(x, attention, cells, DENSE, path)
        epilogue = epilogues(plain)[5]
        y = computing.forward(x, attention, cells, DENSE, path, epilogue)
        torch.testing.assert_close(y, by_hand(plain, epilogue).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use", ["always", "never"])
@pytest.mark.parametrize("lasting", [False, True])
def test_mixing_along_the_rank_finishes_too(use, lasting) -> None:  # type: ignore[no-untyped-def]
    x, attention, cells = tensors(DENSE)
    generator = torch.Generator().manual_seed(2)
    hidden, mixtures = torch.randn(2, 3, generator=generator), attention.shape[1]
    weight = torch.randn(mixtures * (CELLS + 1), 3, generator=generator)
    bias = torch.randn(mixtures * (CELLS + 1), generator=generator)
    initial = torch.arange(mixtures) % CELLS
    factors = AttentionFactors(hidden, weight, bias, torch.tensor(0.25), initial, lasting)
    plain = factored.compute(x, factors, cells, DENSE, "auto")
    with bases(use):
        for epilogue in epilogues(plain) * 2:  # the second time, with bases that are kept
            y = factored.compute(x, factors, cells, DENSE, "auto", epilogue)
            assert error(y, by_hand(plain, epilogue)) < 1e-5


def test_what_is_no_number_stays_none() -> None:
    x, attention, cells = tensors(POINTWISE)
    x[0, :, 0, 0] = torch.nan
    x[1, :, 0, 0] = torch.inf
    for path, activation in itertools.product(PATHS, ("relu", "relu6")):
        if path.refusal(Problem(POINTWISE, 2, SIZE, CELLS, x.dtype, x.device)) is None:
            plain = computing.forward(x, attention, cells, POINTWISE, path)
            y = computing.forward(x, attention, cells, POINTWISE, path, Epilogue(activation=activation))
            assert y[0, :, 0, 0].isnan().all()
            torch.testing.assert_close(y, ACTIVATIONS[activation](plain), equal_nan=True)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_what_a_pass_cannot_read_is_done_after_it() -> None:
    x, attention, cells = tensors(DENSE)
    path = PATHS[0]
    plain = computing.forward(x, attention, cells, DENSE, path)
    every_other = torch.randn(42)[::2]  # not contiguous
    precise = torch.randn(21, dtype=torch.float64)
    norm = Norm(torch.zeros(21), torch.ones(21), every_other, None, 1e-5)
    one_row = torch.randn(plain.shape)[..., :1]  # broadcast
    for epilogue in (Epilogue(scale=precise), Epilogue(norm=norm), Epilogue(added=one_row, activation="relu")):
        assert not epilogue.fits(plain)
        y = computing.forward(x, attention, cells, DENSE, path, epilogue)
        assert error(y, by_hand(plain, epilogue)) < 1e-5
    assert Epilogue(added=F.pad(plain, (0, 1))[..., :-1]).fits(plain) is False
