"""The attention: sums, temperature, norms, half precision, batches of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kw_lightning.nn.attention import ContrastingAttention, attention_parameters
from kw_lightning.nn.partition import partition

SHARE = partition([(16, 16, 3, 3)] * 2, 2).layers[1]


def make(**options) -> ContrastingAttention:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return ContrastingAttention(16, SHARE, **options)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("basis", [None, 1 / 16])
def test_weights_are_normalised_by_their_absolute_sum(norm: str, basis: float | None) -> None:
    attention = make(norm=norm, basis=basis)
    alpha = attention(torch.randn(4, 16, 5, 5), torch.tensor(0.0))
    assert alpha.shape == (4, SHARE.mixtures, SHARE.cells)
    assert (alpha.abs().sum(-1) < 1).all()
    assert (alpha < 0).any()


def test_at_temperature_one_every_mixture_is_one_cell() -> None:
    alpha = make()(torch.randn(4, 16, 5, 5), torch.tensor(1.0))
    assert torch.equal(alpha.argmax(-1), torch.tensor(SHARE.initial_cells).expand(4, -1))
    assert torch.equal(alpha.sum(-1), torch.ones(4, SHARE.mixtures))


def test_the_start_is_no_weight_and_follows_the_weights_device() -> None:
    attention = make()
    assert not [name for name in attention.state_dict() if "start" in name]
    assert attention.start.shape == (SHARE.mixtures, SHARE.cells)
    assert attention.to("meta").start.is_meta


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("basis", [None, 1 / 16, 1 / 2])
def test_counted_parameters_are_those_made(norm: str, basis: float | None) -> None:
    made = sum(p.numel() for p in make(norm=norm, basis=basis).parameters())
    assert attention_parameters(16, SHARE, norm=norm, basis=basis) == made


def test_a_training_batch_of_one_uses_the_running_statistics_and_leaves_them() -> None:
    attention = make().train()
    before = attention.norm.running_mean.clone()
    x = torch.randn(1, 16, 5, 5)
    trained = attention(x, torch.tensor(0.0))
    assert torch.equal(attention.norm.running_mean, before)
    assert torch.allclose(trained, attention.eval()(x, torch.tensor(0.0)))
    attention.train()(torch.randn(2, 16, 5, 5), torch.tensor(0.0))
    assert not torch.equal(attention.norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_largest_activations_of_half_precision_give_finite_weights_and_gradients(
    dtype: torch.dtype, channels_last: bool
) -> None:
    attention = make(channels_last=channels_last).train()
    shape = (4, 9, 16) if channels_last else (4, 16, 3, 3)
    x = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    x[1:] *= -torch.rand(3, 1, 1, 1).view(3, *[1] * (x.dim() - 1)).to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        alpha = attention(x, torch.tensor(0.3))
    assert alpha.dtype == torch.float32
    alpha.square().sum().backward()
    assert alpha.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_a_network_turned_to_half_precision_as_a_whole_still_works() -> None:
    attention = make().to(torch.bfloat16).train()
    alpha = attention(torch.randn(4, 16, 3, 3, dtype=torch.bfloat16), torch.tensor(0.3))
    alpha.sum().backward()
    assert alpha.isfinite().all()
    assert attention.reduce.weight.grad.dtype == torch.bfloat16


def test_start_values_are_kaiming_normal_of_the_fan_out() -> None:
    torch.manual_seed(0)
    attention = ContrastingAttention(512, SHARE, reduction=0.5)
    assert attention.reduce.weight.detach().std() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert attention.expand.weight.detach().std() == pytest.approx((2 / attention.expand.out_features) ** 0.5, rel=0.05)
    assert not attention.expand.bias.any()
    assert attention.reduce.bias is None
    assert isinstance(attention.norm, nn.BatchNorm1d)
    assert ContrastingAttention(512, SHARE, norm="layer").reduce.bias is not None
