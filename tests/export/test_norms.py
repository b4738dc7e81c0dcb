"""Batch norms folded into the layers before them: the same function, and cells that stay shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.export.norms import fold_norms
from kw_lightning.nn import KWConv2d, KWLayer, share_warehouse


class Branches(nn.Module):
    """Dynamic and static convolutions with norms after them, and one output that more than its norm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.first_norm = KWConv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = KWConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.both, self.both_norm = KWConv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.twice = nn.BatchNorm2d(8)
        share_warehouse([self.first, self.second, self.both], budget=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        y = self.both(x)
        return self.twice(self.twice(self.both_norm(y)) + y)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Branches()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return made.eval()


@torch.no_grad()
def test_folded_network_computes_the_same(network: nn.Module) -> None:
    x = torch.randn(3, 3, 9, 9)
    folded, count = fold_norms(network)
    assert count == 3
    assert torch.allclose(folded(x), network(x), atol=1e-5)
    left = {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {"both_norm", "twice"}  # its input is taken twice; it is called twice
    assert isinstance(network.first_norm, nn.BatchNorm2d)
    layers = [module for module in folded.modules() if isinstance(module, KWLayer)]
    assert len({id(layer.warehouse) for layer in layers}) == 1
    assert torch.equal(layers[0].warehouse.cells, network.first.warehouse.cells)
    again, none = fold_norms(folded)
    assert none == 0
    assert again is folded


@torch.no_grad()
def test_norms_that_cannot_be_folded_stay(network: nn.Module) -> None:
    class Asks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > 0 else x

    assert fold_norms(Asks(network))[1] == 0
    assert fold_norms(network.train())[1] == 0
    network.eval().first.register_forward_hook(lambda module, inputs, output: None)
    assert fold_norms(network)[1] == 2
