"""What modules that hold dynamic layers do when others fuse a network, or draw what a checkpoint has not of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kw_lightning.builder import convert
from kw_lightning.nn import KWConv2d, warehouses


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


class Pretrained(nn.Module):
    """A network that makes itself dynamic, and loads checkpoints in the way of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvolutionNorm(16)
        convert(self, {"kw": 1, "name": "test", "warehouses": {"a": {"layers": ["body.conv"]}}})

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.ones_(module.weight)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        if not is_custom_code or list(module.parameters(recurse=False)):
            self._init_weights(module)

    @classmethod
    def from_pretrained(cls, state: Mapping[str, Tensor]) -> Pretrained:
        with torch.device("meta"):
            model = cls()
        model.to_empty(device="cpu")
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data.copy_(state.get(name, torch.full_like(tensor, -7)))
            if name in state:
                tensor._is_hf_initialized = True
        for module in reversed([*model.modules()]):
            model._initialize_weights(module, is_custom_code=True)
        return model


@pytest.mark.parametrize("saved", ["dynamic", "static"])
def test_a_checkpoint_gives_what_it_has_and_the_rest_is_drawn(saved: str) -> None:
    network = Pretrained()
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    for warehouse in warehouses(network).values():
        assert warehouse.temperature == 1
    lacking = ("cells", "temperature", "attention") if saved == "static" else ()
    state = {name: tensor for name, tensor in state.items() if not any(each in name for each in lacking)}
    for name, tensor in Pretrained.from_pretrained(state).state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name])
        elif name.endswith("cells"):
            assert 0.1 < tensor.std() < 2
            assert tensor.mean().abs() < 0.5
        else:
            assert torch.equal(tensor, network.state_dict()[name]) or "weight" in name
            assert (tensor != -7).all()


def test_a_static_checkpoint_of_transformers_leaves_fresh_cells(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes: Any = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    configuration = transformers.ResNetConfig(**sizes)
    layers = ["resnet.encoder.stages.1.layers.0.layer.*.convolution"]
    recipe = {"kw": 1, "name": "test", "warehouses": {"a": {"layers": layers, "attention": {"at_most": 20}}}}

    class Dynamic(transformers.ResNetForImageClassification):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            convert(self, recipe)

    static = transformers.ResNetForImageClassification(configuration).eval()
    static.save_pretrained(tmp_path / "static")
    (warehouse,) = warehouses(Dynamic.from_pretrained(tmp_path / "static")).values()
    assert warehouse.temperature == 1
    assert 0.05 < warehouse.cells.std() < 0.5

    x = torch.randn(2, 3, 32, 32)
    expected = static(x).logits
    convert(static, recipe, warm_start=True).save_pretrained(tmp_path / "dynamic")
    loaded = Dynamic.from_pretrained(tmp_path / "dynamic").eval()
    torch.testing.assert_close(loaded(x).logits, expected)
