"""The attention's hidden activations in one step: as torch's operators give them, and left to them at need."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, engine, share_warehouse
from kw_lightning.nn import attention as attention_module
from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.native.attention import SHARED
from kw_lightning.nn.hidden import activate
from kw_lightning.nn.partition import partition

SHARE = partition([(70, 70, 3, 3)], 1).layers[0]
SIZES = {"means": (), "length": (9,), "map": (6, 7), "volume": (3, 4, 2), "one position": (1, 1)}

compiled = pytest.mark.skipif(not native.available(), reason="no C compiler")


def make(norm: str = "batch", *, channels_last: bool = False) -> ContrastingAttention:
    torch.manual_seed(0)
    made = ContrastingAttention(70, SHARE, norm=norm, channels_last=channels_last)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in (made.norm.weight, made.norm.bias, *(made.norm.buffers() if norm == "batch" else ())):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return made


def draw(batch: int, size: tuple[int, ...], layout: str) -> Tensor:
    x = torch.randn(batch, 70, *size)
    if layout == "channels last" and len(size) in (2, 3):
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[len(size)])
    if layout == "sliced":
        if not size:
            return torch.randn(batch, 5, 70)[:, 1]  # as a class token is
        return torch.randn(batch, 140, *size)[:, ::2]
    return x


@compiled
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_activations_and_gradients_are_those_of_double_precision(
    size: tuple[int, ...], layout: str, norm: str, training: bool
) -> None:
    for batch in (0, 1, 2, 33):
        if training and norm == "batch" and batch == 0:
            continue  # torch's norm has no gradient of no sample either
        made = make(norm).train(training)
        double = copy.deepcopy(made).double()
        x = draw(batch, size, layout)
        with torch.no_grad():
            alone = copy.deepcopy(made).hidden(x)
        one, other = x.clone().requires_grad_(), x.double().requires_grad_()
        hidden, expected = made.hidden(one), double._by_modules(double._pool(other))
        torch.testing.assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone, hidden.detach(), rtol=1e-5, atol=1e-6)
        gradient = torch.randn(hidden.shape)
        hidden.backward(gradient)
        expected.backward(gradient.double())
        # A norm over two samples gives gradients that are what two large numbers leave, in torch's operators alike.
        close = {"rtol": 1e-4, "atol": 2e-4 if training and batch == 2 else 1e-5}
        torch.testing.assert_close(one.grad.double(), other.grad, **close)
        for (name, parameter), exact in zip(made.named_parameters(), double.parameters(), strict=True):
            if exact.grad is not None:
                torch.testing.assert_close(parameter.grad.double(), exact.grad, msg=name, **close)
        for buffer, exact in zip(made.norm.buffers(), double.norm.buffers(), strict=True):
            torch.testing.assert_close(buffer.to(exact.dtype), exact, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("channels", [1024, 1031])
def test_gradients_of_many_channels_are_shared_among_threads(channels: int) -> None:
    torch.manual_seed(0)
    made = ContrastingAttention(channels, SHARE)
    double = copy.deepcopy(made).double()
    batch = 2 * SHARED // (channels * made.reduce.out_features)
    pooled, gradient = torch.randn(batch, channels), torch.randn(batch, made.reduce.out_features)
    found = []
    for one, dtype in ((made, torch.float32), (double, torch.float64)):
        x = pooled.to(dtype, copy=True).requires_grad_()
        one._hidden(x).backward(gradient.to(dtype))
        found.append([x.grad.double(), one.reduce.weight.grad.double()])
    for one, exact in zip(*found, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("size", [(), (3, 2)], ids=["means", "map"])
def test_second_derivatives_are_those_of_torch(size: tuple[int, ...], norm: str, training: bool) -> None:
    found = []
    for by_torch in (False, True):
        made = make(norm).train(training)
        x = torch.randn(4, 70, *size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = made._by_modules(made._pool(x)) if by_torch else made.hidden(x)
        (gradient,) = torch.autograd.grad(hidden.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [x, made.reduce.weight, made.norm.weight]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@compiled
def test_a_map_that_needs_a_gradient_goes_in_one_step_and_gets_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ContrastingAttention, "_pool")
    x = torch.randn(3, 70, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(make().hidden(x).square().sum(), x)
    assert gradient.stride()[2:] == (0, 0)


@compiled
def test_a_cumulative_average_of_the_statistics_is_kept() -> None:
    one, other = make(), make()
    one.norm.momentum = other.norm.momentum = None
    for _ in range(3):
        pooled = torch.randn(5, 70)
        one._hidden(pooled), other._by_modules(pooled)
    assert one.norm.num_batches_tracked == 3
    torch.testing.assert_close(one.norm.running_var, other.norm.running_var)
    torch.testing.assert_close(one.norm.running_mean, other.norm.running_mean)


@compiled
def test_frozen_parameters_get_no_gradient() -> None:
    made = make("layer")
    made.reduce.requires_grad_(False)
    pooled = torch.randn(3, 70)
    made._hidden(pooled).sum().backward()
    assert made.reduce.weight.grad is None
    assert made.reduce.bias.grad is None
    assert made.norm.weight.grad is not None


def test_what_is_no_number_stays_in_its_sample() -> None:
    made = make().eval()
    x = torch.randn(3, 70, 4, 4)
    x[1] = torch.nan
    with torch.no_grad():
        hidden = made.hidden(x)
    assert hidden[1].isnan().all()
    assert hidden[[0, 2]].isfinite().all()


def _hook(made: ContrastingAttention) -> None:
    made.norm.register_forward_hook(lambda *_: None)


def _patch(made: ContrastingAttention) -> None:
    made.reduce.forward = lambda x: nn.Linear.forward(made.reduce, x)  # type: ignore[method-assign]


def _replace(made: ContrastingAttention) -> None:
    made.norm = nn.SyncBatchNorm(16)


def _forget(made: ContrastingAttention) -> None:
    made.norm.running_mean = None


def _turn(made: ContrastingAttention) -> None:
    made.reduce.weight = nn.Parameter(torch.randn(70, 16).t())


@pytest.mark.parametrize("change", [_hook, _patch, _replace, _forget, _turn])
def test_modules_that_are_not_as_they_were_made_are_called(change: Callable[[ContrastingAttention], None]) -> None:
    made = make().eval()
    change(made)
    assert activate(torch.randn(3, 70), made.reduce, made.norm) is None


def test_other_types_and_empty_inputs_are_left_to_torch() -> None:
    made = make().eval()
    for pooled in (torch.randn(3, 70).double(), torch.randn(3, 70).bfloat16(), torch.randn(0, 70)):
        assert activate(pooled, made.reduce, made.norm) is None
    with torch.device("meta"):
        assert activate(torch.randn(3, 70), made.reduce, made.norm) is None


@compiled
def test_operators_are_seen_by_what_looks_at_all_of_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    made = make().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.hidden(torch.randn(3, 70, 4, 4))
    assert counter.get_total_flops() == 2 * 3 * 70 * 16


@compiled
def test_a_layer_takes_the_step_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor | None] = []

    def record(*arguments: object) -> Tensor | None:
        taken.append(activate(*arguments))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(attention_module, "activate", record)
    layer = KWConv2d(70, 70, 3, padding=1)
    layer.engine = "mix_outputs"  # no compiled pass computes it, with which the step would be one call
    share_warehouse([layer])
    assert engine.needs_alpha("auto") is False
    layer(torch.randn(2, 70, 5, 5, requires_grad=True)).sum().backward()
    layer(torch.randn(2, 70, 5, 5)).sum().backward()  # as a network's first layer
    with torch.inference_mode():
        layer(torch.randn(2, 70, 5, 5))
    assert [found is not None for found in taken] == [True, True, True]


@compiled
@pytest.mark.parametrize("together", [False, True], ids=["channels first", "channels last"])
def test_means_take_every_position_of_a_channel_once_and_of_no_other(together: bool) -> None:
    torch.manual_seed(0)
    for channels in (3, 70, 530):
        weight = torch.randn(4, channels)
        for positions in (1, 7, 8, 9, 49, 515, 1100):
            x = torch.randn(2, channels, positions)
            x[1, 1, positions // 2] = torch.inf
            x = x.mT.contiguous().mT if together else x
            one = torch.ones(4)
            found = native.activate(x, weight, None, one, one, None, 0.0, 1e-5, native.OF_SAMPLE)
            torch.testing.assert_close(found.pooled.double(), x.double().mean(2), rtol=1e-6, atol=1e-6)
