"""What mixtures start as: a cell of their own, one that several share, or nothing in particular."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from kw_lightning.nn import KWConv2d, KWLayer, set_temperature, share_warehouse
from kw_lightning.nn.partition import partition
from kw_lightning.nn.warm_start import load_kernels

KERNELS = [(8, 8, 3, 3), (8, 16, 3, 3)]


@pytest.mark.parametrize("budget", [Fraction(1, 2), Fraction(1, 4), Fraction(2, 3)])
def test_a_shared_start_deals_each_layers_cells_out_evenly(budget: Fraction) -> None:
    own, shared = (partition(KERNELS, budget, start=start) for start in ("own", "shared"))
    assert own.cells == shared.cells
    for before, layer in zip(own.layers, shared.layers, strict=True):
        assert (before.first_cell, before.own_cells) == (layer.first_cell, layer.own_cells)
        places = torch.tensor(layer.initial_cells)
        assert (places.diff() >= 0).all()
        assert set(places.tolist()) == set(range(layer.first_cell, layer.first_cell + layer.own_cells))
        counts = places.bincount()[layer.first_cell :]
        assert counts.max() - counts.min() <= 1
        assert own.cells not in layer.initial_cells


def test_from_a_budget_of_one_on_a_shared_start_is_ones_own() -> None:
    for budget in (1, 2, Fraction(5, 2)):
        assert partition(KERNELS, budget, start="shared") == partition(KERNELS, budget)


def test_a_layer_without_a_cell_of_its_own_starts_as_its_neighbours() -> None:
    geometry = partition([(8, 8, 1, 1), (8, 8, 3, 3)], Fraction(1, 9), start="shared")
    assert geometry.cells == 1
    assert all(set(layer.initial_cells) == {0} for layer in geometry.layers)


def layers_of(**options: object) -> list[KWLayer]:
    torch.manual_seed(0)
    layers = [KWConv2d(8, 8, 3, padding=1, bias=False), KWConv2d(8, 8, 3, padding=1, bias=False)]
    share_warehouse(layers, dtype=torch.float64, **options)  # type: ignore[arg-type]
    return list(layers)


def test_without_a_start_the_temperature_has_no_effect() -> None:
    (layer, _), x = layers_of(start="none", norm="layer"), torch.randn(3, 8, 5, 5, dtype=torch.float64)
    found = [layer.attend(x)]
    assert layer.attention is not None
    hidden = torch.relu(layer.attention.norm(layer.attention.reduce(x.mean((2, 3)))))
    z = layer.attention.expand(hidden).view(3, 9, 19)
    for temperature in (0.5, 0.0):
        set_temperature(nn.ModuleList([layer]), temperature)
        found.append(layer.attend(x))
    expected = z[..., :-1] / (z.abs().sum(-1, keepdim=True) + 1e-3)
    for alpha in found:
        torch.testing.assert_close(alpha, expected, rtol=1e-12, atol=1e-14)
    assert "start='none'" in repr(layer.attention)


def test_a_warm_start_gives_a_shared_cell_the_mean_of_its_kernels_parts() -> None:
    layers = layers_of(start="shared", budget=0.5)
    kernels = [torch.randn(8, 8, 3, 3, dtype=torch.float64) for _ in layers]
    kept = [kernel.clone() for kernel in kernels]
    error = load_kernels(layers, kernels, 1)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    reached = torch.cat([layer.kernels(layer.attend(x))[0].detach() for layer in layers])
    assert float((reached - torch.cat(kernels)).norm() / torch.cat(kernels).norm()) == pytest.approx(error, rel=1e-9)
    assert 0.6 < error < 0.8, "the mean of two independent numbers leaves half of their squares"
    assert all(torch.equal(kernel, before) for kernel, before in zip(kernels, kept, strict=True))


def test_without_a_start_a_warm_start_goes_by_the_attention() -> None:
    layers = layers_of(start="none", norm="layer")
    kernels = [torch.randn(8, 8, 3, 3, dtype=torch.float64) for _ in layers]
    assert load_kernels(layers, kernels, 1) == 0
    for layer, kernel in zip(layers, kernels, strict=True):
        reached = layer.kernels(layer.attend(torch.randn(2, 8, 5, 5, dtype=torch.float64)))
        torch.testing.assert_close(reached, kernel.expand(2, -1, -1, -1, -1), rtol=2e-3, atol=2e-3)
