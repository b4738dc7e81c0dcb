"""Starting from static kernels under a budget of 1, where there are fewer cells than parts of kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.warm_start import best_cells, load_kernels


def layers_of(**options: object) -> list[KWLayer]:
    layers = [KWConv2d(8, 8, 3, padding=1), KWConv2d(8, 16, 3, padding=1)]
    share_warehouse(layers, dtype=torch.float64, **options)  # type: ignore[arg-type]
    return list(layers)


def kernels_of(layers: list[KWLayer], *, rank: int = 64) -> list[Tensor]:
    """Return kernels whose parts of 8 × 8 numbers lie in a space of so many dimensions."""
    space = torch.randn(rank, 64, dtype=torch.float64)
    parts = [torch.randn(9, shape[0] // 8, rank, dtype=torch.float64) @ space for shape in _shapes(layers)]
    return [part.view(3, 3, -1, 8).permute(2, 3, 0, 1).contiguous() for part in parts]


def _shapes(layers: list[KWLayer]) -> list[tuple[int, ...]]:
    return [layer.kernel_shape for layer in layers]


def mixed(layer: KWLayer, samples: int = 3) -> Tensor:
    return layer.kernels(layer.attend(torch.randn(samples, 8, 5, 5, dtype=torch.float64)))


@pytest.mark.parametrize("options", [{}, {"basis": 0.5}, {"norm": "layer"}])
def test_the_cells_leave_the_smallest_error_that_so_many_can(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layers = layers_of(budget=0.5, **options)
    kernels = kernels_of(layers)
    error = load_kernels(layers, kernels, 0)
    set_temperature(nn.ModuleList(layers), 0.0)
    found = [mixed(layer).detach() for layer in layers]
    for several in found:
        torch.testing.assert_close(several[0], several[1])
    # The sum of the squares that the singular vectors after the first 13 hold (27 parts, budget 1/2).
    parts = torch.cat([kernel.permute(2, 3, 0, 1).reshape(-1, 64) for kernel in kernels])
    least = torch.linalg.svdvals(parts)[13:].square().sum()
    lost = sum((several[0] - kernel).square().sum() for several, kernel in zip(found, kernels, strict=True))
    assert float(lost) == pytest.approx(float(least), rel=1e-9)
    assert error == pytest.approx(float((lost / sum(kernel.square().sum() for kernel in kernels)).sqrt()), rel=1e-9)


def test_kernels_of_low_rank_are_reached_to_the_last_digits_and_go_on_learning() -> None:
    torch.manual_seed(0)
    layers = layers_of(budget=0.5)
    kernels = kernels_of(layers, rank=10)
    assert load_kernels(layers, kernels, 0) < 1e-12
    network = nn.Sequential(*layers)
    set_temperature(network, 0.0)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    wanted = nn.functional.conv2d(x, kernels[0], padding=1)
    torch.testing.assert_close(layers[0](x) - layers[0].bias.view(-1, 1, 1), wanted, rtol=1e-10, atol=1e-10)
    network(x).square().sum().backward()
    for layer in layers:
        assert layer.attention.expand.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_weights_are_within_what_the_attention_can_give() -> None:
    torch.manual_seed(0)
    parts = torch.randn(20, 6, dtype=torch.float64)
    for count in (3, 6, 10):  # more cells than dimensions: some stay unused
        cells, weights = best_cells(parts, count)
        assert cells.shape == (count, 6)
        assert weights.abs().sum(dim=1).max() <= 1 / 1.001 + 1e-12
    torch.testing.assert_close(weights @ cells, parts)
    cells, weights = best_cells(torch.zeros_like(parts), 3)
    assert torch.isfinite(cells).all()
    assert not (weights @ cells).any()


def test_beside_a_smaller_warehouse_a_large_one_has_its_kernels_at_temperature_0_too() -> None:
    torch.manual_seed(0)
    layer = KWLinear(8, 24, bias=False)
    share_warehouse([layer], budget=2, out_ratio=0.25, dtype=torch.float64)
    kernel = torch.randn(24, 8, dtype=torch.float64)
    assert load_kernels([layer], [kernel], 0) == 0
    assert layer.warehouse is not None
    assert layer.warehouse.temperature == 0
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ kernel.T, rtol=1e-10, atol=1e-10)
