"""Weights of the cells that no sample changes: layers that share cells and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kw_lightning.export.norms import fold_norms
from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.warm_start import load_kernels

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
