"""The attention: sums, temperature, norms, half precision, batches of one."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


def test_the_start_follows_weights_that_come_by_assignment() -> None:
    x, temperature = torch.randn(4, 16, 5, 5), torch.tensor(0.5)
    loaded = make().eval()
    expected = loaded(x, temperature)

    assigned = make(device="meta").eval()
    assigned.load_state_dict(loaded.state_dict(), assign=True)
    assert torch.equal(assigned(x, temperature), expected)
    assert assigned.start.device == x.device  # made once

    emptied = make(device="meta").eval().to_empty(device="cpu")
    emptied.load_state_dict(loaded.state_dict())
    assert torch.equal(emptied(x, temperature), expected)

    for module in (copy.deepcopy(assigned), pickle.loads(pickle.dumps(assigned))):
        assert torch.equal(module(x, temperature), expected)

    described = make(device="meta").eval()
    weights = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(described, weights, (x, temperature)), expected)
        assert described(x.to("meta"), temperature.to("meta")).is_meta


def test_what_a_transform_makes_of_the_start_is_not_kept() -> None:
    described = make(device="meta").eval()
    weights = {name: value.detach() for name, value in make().eval().state_dict().items()}
    x = torch.randn(4, 16, 5, 5)

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(described, weights, (x, torch.tensor(0.5))).square().sum()

    trained = {name: value for name, value in weights.items() if name.endswith(("weight", "bias"))}
    gradient = torch.func.grad(lambda trained: loss({**weights, **trained}))(trained)
    assert gradient["reduce.weight"].isfinite().all()
    assert described.start.is_meta


def test_the_start_made_in_inference_mode_serves_training() -> None:
    attention = make(device="meta")
    attention.load_state_dict(make().state_dict(), assign=True)
    x, temperature = torch.randn(4, 16, 5, 5), torch.tensor(0.5)
    with torch.inference_mode():
        attention.eval()(x, temperature)
    assert not attention.start.is_meta
    assert not attention.start.is_inference()
    attention.train()(x, temperature).square().sum().backward()
    assert attention.reduce.weight.grad.isfinite().all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_may_come_between_one_sample_and_its_gradients(dtype: torch.dtype) -> None:
    x, temperature = torch.randn(4, 16, 5, 5, dtype=dtype), torch.tensor(0.3)
    gradients = []
    for batches in ([], [x]):
        attention = make(dtype=dtype).train()
        attention.norm.running_mean.fill_(0.1)
        alpha = attention(x[:1], temperature)
        for batch in batches:
            attention(batch, temperature)
        gradients.append(torch.autograd.grad(alpha.square().sum(), attention.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_means_gradient_is_no_map_of_its_own(channels_last: bool) -> None:
    x = torch.randn(2, *((5, 5, 16) if channels_last else (16, 5, 5)), requires_grad=True)
    positions = (1, 2) if channels_last else (2, 3)
    pooled = make(channels_last=channels_last)._pool(x)
    assert torch.equal(pooled, x.mean(positions))
    (gradient,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled))
    assert torch.equal(gradient, torch.full_like(x, 1 / 25))
    assert [gradient.stride(position) for position in positions] == [0, 0]


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


HALVES = [None, torch.bfloat16, torch.float16]


class Negated(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


@pytest.mark.parametrize("half", HALVES)
def test_parametrizations_of_its_linear_layers_hold(half: torch.dtype | None) -> None:
    attention, x, temperature = make(basis=1 / 16).eval(), torch.randn(4, 16, 5, 5), torch.tensor(0.3)
    attention = attention if half is None else attention.to(half)
    bound, plain = copy.deepcopy(attention), copy.deepcopy(attention)
    for name in ("reduce", "expand", "basis"):
        parametrize.register_parametrization(getattr(bound, name), "weight", Negated())
        getattr(plain, name).weight.data.neg_()
    assert torch.allclose(bound(x, temperature), plain(x, temperature), atol=1e-6)
    assert not torch.allclose(bound(x, temperature), attention(x, temperature), atol=1e-2)
    assert torch.isfinite(parametrizations.spectral_norm(bound.expand) and bound(x, temperature)).all()


@pytest.mark.parametrize("half", HALVES)
def test_pruned_weights_of_its_linear_layers_stay_zero_and_get_no_gradient(half: torch.dtype | None) -> None:
    attention = make().train()
    prune.random_unstructured(attention.expand, "weight", 0.75)
    attention = attention if half is None else attention.to(half)
    attention(torch.randn(4, 16, 5, 5), torch.tensor(0.3)).square().sum().backward()
    gradient = attention.expand.weight_orig.grad
    assert gradient[attention.expand.weight_mask == 0].eq(0).all()
    assert gradient[attention.expand.weight_mask == 1].ne(0).any()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
def test_hooks_on_its_linear_layers_see_and_change_what_goes_through(half: torch.dtype | None, autocast: bool) -> None:
    attention = make(basis=1 / 16).eval()
    attention = attention if half is None else attention.to(half)
    seen = []
    for linear in (attention.reduce, attention.expand, attention.basis):
        linear.register_forward_hook(lambda module, args, output: seen.append((module, output.dtype)))
    attention.expand.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.autocast("cpu", enabled=autocast):
        alpha = attention(torch.randn(4, 16, 5, 5), torch.tensor(0.0))
    order = (attention.reduce, attention.expand, attention.basis)
    assert seen == [(linear, torch.float32) for linear in order]
    assert alpha.eq(0).all()


def test_its_linear_layers_can_be_quantized_dynamically() -> None:
    attention, x, temperature = make(basis=1 / 16).eval(), torch.randn(4, 16, 5, 5), torch.tensor(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao is to replace it
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(attention), {nn.Linear})
    assert not isinstance(quantized.reduce, nn.Linear)
    alpha = quantized.to("cpu")(x, temperature)
    assert 0 < (alpha - attention(x, temperature)).abs().max() < 0.05


def test_half_precision_without_hooks_takes_the_short_way_to_the_same_numbers() -> None:
    attention, x, temperature = make().bfloat16().eval(), torch.randn(4, 16, 5, 5), torch.tensor(0.3)
    short = attention(x, temperature)
    attention.expand.register_forward_hook(lambda *_: None)
    assert torch.equal(attention(x, temperature), short)
