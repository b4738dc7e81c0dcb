"""Gates of a layer's channels: factors of what goes in and comes out, instead of kernels that are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kw_lightning.nn import KWConv2d, KWLayer, KWLinear, share_warehouse
from kw_lightning.nn.attention import ContrastingAttention, attention_size
from kw_lightning.nn.gates import ChannelGates
from kw_lightning.nn.warm_start import load_kernels

BOTH = ("input", "output")
LAYERS: list[tuple[type[KWLayer], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    (KWConv2d, (8, 12, 3), {"padding": 1}, (8, 6, 6)),
    (KWConv2d, (8, 12, 3), {"groups": 4, "padding_mode": "reflect", "padding": 2}, (8, 6, 6)),
    (KWLinear, (8, 12), {}, (5, 8)),
    (KWLinear, (8, 12), {"bias": False}, (8,)),
]


def gated(kind: type[KWLayer], sizes: tuple[int, ...], options: dict[str, Any], **shared: Any) -> KWLayer:
    torch.manual_seed(0)
    layer = kind(*sizes, **options, dtype=torch.float64)  # type: ignore[arg-type]
    share_warehouse([layer], dtype=torch.float64, norm="layer", **{"gates": BOTH, **shared})
    return layer


def without(layer: KWLayer, x: Tensor, alpha: Tensor, factors: Any, sample: int) -> Tensor:
    """Return a sample's output by its own kernel, whose rows and columns are scaled."""
    kernel = layer.kernels(alpha)[sample]
    inputs = factors.input[sample].view(-1, kernel.shape[1])  # [groups, channels of a group]
    rows = inputs.repeat_interleave(kernel.shape[0] // len(inputs), 0)
    kernel = kernel * rows.view(*rows.shape, *[1] * (kernel.dim() - 2))
    kernel = kernel * factors.output[sample].view(-1, *[1] * (kernel.dim() - 1))
    if isinstance(layer, KWLinear):
        return torch.nn.functional.linear(x[sample], kernel, layer.bias)
    assert isinstance(layer, KWConv2d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = torch.nn.functional.pad(x[sample, None], layer._pad, mode=mode)
    return torch.nn.functional.conv2d(padded, kernel, layer.bias, groups=layer.groups)[0]


@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), LAYERS)
def test_gates_are_scaled_kernels(
    kind: type[KWLayer], sizes: tuple[int, ...], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    layer = gated(kind, sizes, options, function="softmax")
    assert layer.warehouse is not None
    attention = layer.attention
    assert isinstance(attention, ContrastingAttention)
    assert attention.gates is not None
    layer.warehouse.set_temperature(0.25)
    x = torch.randn(3, *shape, dtype=torch.float64)
    hidden, temperature = attention.hidden(x), layer.warehouse.temperature
    factors = attention.gates(hidden, temperature, torch.tensor(2.0))
    for linear, found in ((attention.gates.input, factors.input), (attention.gates.output, factors.output)):
        expected = 0.25 + 0.75 / (1 + torch.exp(-(hidden @ linear.weight.T + linear.bias) / 2))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    factors, alpha, y = attention.gates(hidden, temperature), layer.attend(x), layer(x)
    for sample in range(3):
        torch.testing.assert_close(y[sample], without(layer, x, alpha, factors, sample), rtol=1e-9, atol=1e-10)
    y.square().sum().backward()
    learnt = [*attention.gates.parameters(), layer.warehouse.cells]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learnt)


def test_gates_are_open_at_temperature_one_and_follow_the_sample_where_there_is_no_start() -> None:
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    open_, bare = gated(KWConv2d, (8, 12, 3), {}), gated(KWConv2d, (8, 12, 3), {}, gates=())
    bare.load_state_dict(open_.state_dict(), strict=False)
    torch.testing.assert_close(open_(x), bare(x), rtol=0, atol=0)
    followed = gated(KWConv2d, (8, 12, 3), {}, start="none")
    assert followed.attention is not None
    factors = followed.attention.gates(torch.zeros(2, 16, dtype=torch.float64), torch.tensor(1.0))  # type: ignore[misc]
    assert torch.equal(factors.input, torch.full((2, 8), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("gates", [(), ("input",), ("output",), BOTH])
def test_the_size_of_an_attention_counts_its_gates(gates: tuple[str, ...]) -> None:
    layer = gated(KWConv2d, (8, 12, 3), {}, gates=gates)
    assert layer.attention is not None
    assert layer.partition is not None
    channels = ("input" in gates) * 8 + ("output" in gates) * 12
    counted = attention_size(8, 9, 9, layer.partition.budget, norm="layer", gated_channels=channels)
    assert counted == sum(parameter.numel() for parameter in layer.attention.parameters())


@pytest.mark.parametrize("start", ["own", "none"])
def test_a_warm_start_at_temperature_zero_has_the_old_kernel_behind_its_gates(start: str) -> None:
    layer = gated(KWConv2d, (8, 12, 3), {"bias": False}, start=start)
    kernel, x = torch.randn(12, 8, 3, 3, dtype=torch.float64), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert load_kernels([layer], [kernel], 0) == 0
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, kernel), rtol=1e-2, atol=1e-2)


def test_gates_under_autocast_are_as_exact_as_the_attention() -> None:
    layer = gated(KWConv2d, (8, 12, 3), {}).float()
    assert isinstance(layer.attention, ContrastingAttention)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer.attention.hidden(torch.randn(2, 8, 6, 6))
        assert layer.attention.gates is not None
        assert layer.attention.gates(hidden, torch.tensor(0.0)).input.dtype == torch.float32  # type: ignore[union-attr]
        assert layer(torch.randn(2, 8, 6, 6)).dtype == torch.bfloat16
    half = layer.to(torch.bfloat16)
    assert half(torch.randn(2, 8, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gates_leave_the_batch_free_in_an_exported_graph() -> None:
    layer = gated(KWConv2d, (8, 12, 3), {}, function="softmax").float().eval()
    x = torch.randn(5, 8, 6, 6)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r'found the unknown gate "inputs".*did you mean "input"'):
        ChannelGates(16, 8, 8, ["inputs"])  # type: ignore[list-item]
