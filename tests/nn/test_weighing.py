"""Weights of the cells: each function against its closed form, and weights that no sample changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.export.norms import fold_norms
from kw_lightning.nn import (
    ContrastingAttention,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLayer,
    KWLinear,
    set_temperature,
    share_warehouse,
)
from kw_lightning.nn.attention import attention_parameters
from kw_lightning.nn.partition import Start, partition
from kw_lightning.nn.warm_start import load_kernels
from kw_lightning.nn.weighing import FUNCTIONS, Function

SHARE = partition([(16, 16, 3, 3)] * 2, 2).layers[1]


def closed_form(function: str, z: Tensor, temperature: Tensor) -> Tensor:
    """Return the weights of z in plain numbers, one mixture after the other."""
    rows = []
    for row in z.flatten(0, -2).tolist():
        size = sum(map(abs, row)) + 1e-3
        powers = [math.exp(number / float(temperature)) for number in row]
        rows.append(
            {
                "contrast": [number / size for number in row[:-1]],
                "softmax": [power / sum(powers) for power in powers],
                "sigmoid": [1 / (1 + math.exp(-number)) for number in row],
                "relu": [max(number, 0) / size for number in row],
            }[function]
        )
    return torch.tensor(rows, dtype=torch.float64).view(*z.shape[:-1], -1)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("start", ["own", "none"])
@pytest.mark.parametrize("basis", [None, 1 / 16])
def test_each_function_is_its_closed_form(function: Function, start: Start, basis: float | None) -> None:
    torch.manual_seed(0)
    attention = ContrastingAttention(16, SHARE, function=function, start=start, basis=basis, dtype=torch.float64)
    x = torch.randn(4, 16, 5, 5, dtype=torch.float64)
    z = attention._expand(torch.relu(attention.norm(attention.reduce(x.mean((2, 3))))))
    assert z.shape[-1] == attention.columns == SHARE.cells + (function == "contrast")
    temperature, softmax_temperature = torch.tensor(0.25), torch.tensor(4.0)
    found = attention(x, temperature, softmax_temperature)
    expected = closed_form(function, z, softmax_temperature)
    if start == "own":
        expected = 0.25 * attention.start + 0.75 * expected
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    if function != "softmax":
        assert torch.equal(found, attention(x, temperature))
    made = sum(parameter.numel() for parameter in attention.parameters())
    assert attention_parameters(16, SHARE, basis=basis, function=function) == made
    found.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_a_high_temperature_makes_the_softmax_even() -> None:
    attention = ContrastingAttention(16, SHARE, function="softmax", start="none")
    found = attention(torch.randn(4, 16, 5, 5), torch.tensor(0.0), torch.tensor(1e6))
    torch.testing.assert_close(found, torch.full_like(found, 1 / SHARE.cells), rtol=1e-4, atol=0)


def test_functions_that_are_none_and_starts_that_need_other_signs_are_refused() -> None:
    with pytest.raises(ValueError, match=r'found the unknown function "softmin".*did you mean "softmax"'):
        ContrastingAttention(16, SHARE, function="softmin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contrast, which alone gives any weights"):
        ContrastingAttention(16, SHARE, function="sigmoid").start_from(torch.zeros(SHARE.mixtures, SHARE.cells))


def test_a_softmax_of_one_mixture_starts_warm_at_any_temperature() -> None:
    layer = KWConv2d(8, 8, 3, bias=False)
    share_warehouse([layer], cells=4, spatial="whole", function="softmax", start="none", dtype=torch.float64)
    kernel = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    assert load_kernels([layer], [kernel], 0) == 0
    reached = layer.kernels(layer.attend(torch.randn(3, 8, 5, 5, dtype=torch.float64)))
    torch.testing.assert_close(reached, kernel.expand(3, -1, -1, -1, -1), rtol=1e-12, atol=1e-12)


LAYERS: list[tuple[type[KWLayer], tuple[object, ...], dict[str, object], tuple[int, ...]]] = [
    (KWConv1d, (8, 8, 3), {"padding": "same"}, (8, 9)),
    (KWConv2d, (8, 8, 3), {"stride": 2, "padding": 1, "padding_mode": "reflect"}, (8, 9, 9)),
    (KWConv2d, (8, 8, 3), {"groups": 4, "dilation": 2}, (8, 9, 9)),
    (KWConv3d, (8, 8, 3), {"bias": False}, (8, 4, 4, 4)),
    (KWLinear, (8, 8), {}, (5, 8)),
]


@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), LAYERS)
def test_one_kernel_serves_all_samples(
    kind: type[KWLayer], sizes: tuple[object, ...], options: dict[str, object], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    learnt = kind(*sizes, **options, dtype=torch.float64)  # type: ignore[arg-type]
    warehouse = share_warehouse([learnt], dynamic=False, dtype=torch.float64)
    warehouse.set_temperature(0.3)
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    alpha = learnt.attend(x)
    assert alpha.shape[0] == 1
    assert learnt.partition is not None
    # The closed form, and the same layer as a dynamic one whose samples all have these weights.
    attention = learnt.attention
    assert attention is not None
    z = attention.z  # type: ignore[union-attr]
    expected = 0.3 * attention.start + 0.7 * z[:, :-1] / (z.abs().sum(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(alpha[0], expected, rtol=1e-7, atol=1e-8)

    dynamic = copy.deepcopy(learnt)
    dynamic.engine = "reference"
    dynamic.attention = _Same(alpha.detach())  # type: ignore[assignment]
    torch.testing.assert_close(learnt(x), dynamic(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(learnt(x[0]), learnt(x)[0], rtol=1e-9, atol=1e-10)
    learnt(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learnt.parameters())


class _Same(nn.Module):
    """An attention that gives every sample the same weights."""

    dynamic = True

    def __init__(self, alpha: torch.Tensor) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return self.alpha.expand(x.shape[0], -1, -1)


def test_at_temperature_one_it_is_the_static_layer_and_a_warm_start_goes_on_from_there() -> None:
    for temperature in (1, 0):
        layers: list[KWLayer] = [KWConv2d(8, 8, 3, bias=False), KWConv2d(8, 8, 3, bias=False)]
        share_warehouse(layers, dynamic=False, dtype=torch.float64)
        kernels = [torch.randn(8, 8, 3, 3, dtype=torch.float64) for _ in layers]
        assert load_kernels(layers, kernels, temperature) == 0
        set_temperature(nn.ModuleList(layers), temperature)
        for layer, kernel in zip(layers, kernels, strict=True):
            reached = layer.kernels(layer.attend(torch.empty(0)))[0]
            torch.testing.assert_close(reached, kernel, rtol=1e-12, atol=1e-12)


def test_half_precision_and_autocast_compute_as_torchs_layers_do() -> None:
    layer = KWConv2d(8, 8, 3)
    share_warehouse([layer], dynamic=False)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"input type .* should be the same"):
        layer(x.double())


def test_norms_fold_into_layers_with_one_kernel() -> None:
    network = nn.Sequential(KWConv2d(8, 8, 3), nn.BatchNorm2d(8))
    share_warehouse([network[0]], dynamic=False)  # type: ignore[list-item]
    network(torch.randn(4, 8, 5, 5) + 1)
    x = torch.randn(2, 8, 5, 5)
    folded, count = fold_norms(network.eval())
    assert count == 1
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
