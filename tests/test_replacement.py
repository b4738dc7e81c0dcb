"""Modules that hold dynamic layers stay as they are when a network is fused, and the others are fused as ever."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kw_lightning.builder import convert
from kw_lightning.nn import KWConv2d


class ConvolutionNorm(nn.Module):
    """A convolution and its norm, which become one static convolution by `fuse`, as in LeViT and RepViT."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width]."""
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        fused = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 3, padding=1)
        both = fuse_conv_bn_eval(self.conv, self.norm)
        fused.weight.data.copy_(both.weight)
        fused.bias.data.copy_(both.bias)
        return fused


class Branches(nn.Module):
    """Two branches that become one convolution by `reparameterize`, as in MobileOne and RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.merged = ConvolutionNorm(), ConvolutionNorm(), None
        self.fuse = nn.Identity()  # a part of that name is no method

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width]."""
        return self.fuse(self.first(x) + self.second(x) if self.merged is None else self.merged(x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        merged, other = self.first.fuse(), self.second.fuse()
        merged.weight.data = merged.weight + other.weight
        merged.bias.data = merged.bias + other.bias
        self.merged = merged
        del self.first, self.second


def reparameterize(module: nn.Module) -> nn.Module:
    """Fuse all parts of a network that can, as `timm.utils.reparameterize_model` does."""
    for name, child in module.named_children():
        if callable(getattr(type(child), "fuse", None)):
            setattr(module, name, child.fuse())
        elif hasattr(child, "reparameterize"):
            child.reparameterize()
        reparameterize(child)
    return module


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(ConvolutionNorm(), ConvolutionNorm(), Branches(), Branches())
    network(torch.randn(8, 4, 5, 5) * 2 + 1)
    layers = ["1.conv", "3.first.conv"]
    return convert(network, {"kw": 1, "name": "test", "warehouses": {"a": {"layers": layers}}}).eval()


def test_fusing_leaves_dynamic_layers_alone_and_fuses_the_others(network: nn.Module) -> None:
    x = torch.randn(3, 4, 5, 5)
    fused = reparameterize(copy.deepcopy(network))
    kinds = [type(part) for part in fused]
    assert kinds == [nn.Conv2d, ConvolutionNorm, Branches, Branches]
    assert isinstance(fused[1].conv, KWConv2d)
    assert isinstance(fused[2].merged, nn.Conv2d)
    assert isinstance(fused[3].first.conv, KWConv2d)
    assert isinstance(fused[3].second, nn.Conv2d)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_copy_and_a_stored_network_leave_their_own_layers_alone(network: nn.Module) -> None:
    stored = io.BytesIO()
    torch.save(network, stored)
    stored.seek(0)
    for other in (copy.deepcopy(network), torch.load(stored, weights_only=False)):
        assert other[1].fuse() is other[1]
        assert other[1] is not network[1]
        assert other[3].reparameterize() is other[3]
