"""The language is enough: four known networks layer by layer, against torchvision, timm and the published counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kw_lightning.builder import build
from kw_lightning.keras import read_network
from kw_lightning.nn import warehouses
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

PUBLISHED = Path(__file__).parents[1] / "data" / "published"


def in_order(source: nn.Module) -> dict[str, Tensor]:
    """Return the other network's weights without names, for networks with the same modules in the same order."""
    return dict(source.state_dict())


def load_in_order(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights by their order; single dimensions of size 1 may differ (a linear layer for a 1×1 convolution)."""
    own = model.state_dict()
    assert len(own) == len(weights)
    for key, value in zip(own, weights.values(), strict=True):
        assert own[key].squeeze().shape == value.squeeze().shape, key
        own[key] = value.reshape(own[key].shape)
    model.load_state_dict(own)


def disturb(model: nn.Module) -> nn.Module:
    """Give every weight and statistic a random value, so that no term hides behind a start value of 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def same_outputs(ours: nn.Module, theirs: nn.Module, size: int = 224) -> None:
    """Compare two networks on an image; relative to the largest output, since random weights make large ones."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(x), ours.eval()(x)
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def static_network(name: str, parameters: int) -> nn.Module:
    """Return a shipped network, built without warehouses, after a look at its size."""
    network = read_network(load_recipe(name))
    model = network.build()
    assert network.parameters == sum(p.numel() for p in model.parameters()) == parameters
    assert not network.warehouses
    assert network.output_shape == (1000,)
    return model


def test_resnet18_has_torchvision_names() -> None:
    theirs = disturb(torchvision.models.resnet18())
    ours = static_network("keras-resnet18", 11_689_512)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    same_outputs(ours, theirs)
    same_outputs(ours, theirs, 97)


def test_mobilenetv2_gives_what_torchvision_gives() -> None:
    theirs = disturb(torchvision.models.mobilenet_v2())
    ours = static_network("keras-mobilenetv2", 3_504_872)
    load_in_order(ours, in_order(theirs))
    same_outputs(ours, theirs)


def test_convnext_tiny_gives_what_torchvision_gives() -> None:
    theirs = disturb(torchvision.models.convnext_tiny())
    ours = static_network("keras-convnext-tiny", 28_589_128)
    weights = in_order(theirs)
    # torchvision registers the scale before the block, here it comes after it
    for key in [key for key in weights if key.endswith("layer_scale")]:
        last = key.replace("layer_scale", "block.5.bias")
        moved = {}
        for name, value in weights.items():
            if name != key:
                moved[name] = value
            if name == last:
                moved[key] = weights[key]
        weights = moved
    load_in_order(ours, weights)
    same_outputs(ours, theirs)


def test_deit_tiny_gives_what_timm_gives() -> None:
    timm = pytest.importorskip("timm")
    theirs = disturb(timm.create_model("deit_tiny_patch16_224"))
    ours = static_network("keras-deit-tiny", 5_717_416)
    weights: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        part = key.rpartition(".")[2]
        name = re.sub(r"^patch_embed\.proj", "patches", key)
        name = {"cls_token": "class_token.token", "pos_embed": "position.position"}.get(name, name)
        name = re.sub(r"\.mlp\.", ".", name)
        if ".attn.qkv." in name:
            prefix = name.replace(f"attn.qkv.{part}", "attention")
            for projection, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                weights[f"{prefix}.{projection}.{part}"] = rows
        else:
            weights[name.replace("attn.proj", "attention.output")] = value
    own = ours.state_dict()
    ours.load_state_dict({key: value.reshape(own[key].shape) for key, value in weights.items()})
    same_outputs(ours, theirs)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("keras-resnet18-kw-1x", "kw1x_resnet18"),
        ("keras-convnext-tiny-kw-1x", "kw1x_convnext_tiny"),
    ],
)
def test_warehouses_are_those_of_the_published_configuration(name: str, published: str) -> None:
    recorded = json.loads((PUBLISHED / f"{published}.json").read_text())
    planned = plan(load_recipe(name))
    assert planned.parameters.kw == recorded["parameters"]
    found = [(w.partition.cells, list(w.partition.cell_shape)) for w in planned.warehouses]
    assert sorted(found) == sorted((w["cells"], w["cell_shape"]) for w in recorded["warehouses"])
    layers = [(layer.partition.mixtures, layer.partition.first_cell) for w in planned.warehouses for layer in w.layers]
    assert sorted(layers) == sorted((layer["mixtures"], layer["first_cell"]) for layer in recorded["layers"])


def test_mobilenetv2_plans_like_the_recipe_for_torchvision() -> None:
    ours, zoo = plan(load_recipe("keras-mobilenetv2-kw-1x")), plan(load_recipe("mobilenetv2-100-kw-1x"))
    assert ours.parameters == zoo.parameters == (3_504_872, 5_168_146)
    assert [(w.name, w.partition) for w in ours.warehouses] == [
        (w.name, w.partition)
        for w in sorted(zoo.warehouses, key=lambda w: [o.name for o in ours.warehouses].index(w.name))
    ]


def test_deit_tiny_with_one_warehouse() -> None:
    planned = plan(load_recipe("keras-deit-tiny-kw-4x"))
    (warehouse,) = planned.warehouses
    assert (warehouse.partition.mixtures, warehouse.partition.cell_shape) == (108, (192, 192))
    assert [layer.name for layer in warehouse.layers][:3] == [
        "blocks.0.attention.value",
        "blocks.0.fc1",
        "blocks.0.fc2",
    ]
    assert warehouse.partition.cells == 432


def test_dynamic_network_runs() -> None:
    model = build(load_recipe("keras-resnet18-kw-1x", ["model.input=[3, 64, 64]"]))
    assert list(warehouses(model)) == ["stage1", "stage2", "stage3", "stage4"]
    y = model(torch.randn(2, 3, 64, 64))
    y.square().mean().backward()
    assert y.shape == (2, 1000)
    assert all(parameter.grad is not None for parameter in model.parameters())
