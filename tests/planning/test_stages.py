"""`stages: auto`: the published ResNet layouts again, and what it does with other networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import TinyResNet, recipe
from torch import nn
from torchvision import models

from kw_lightning.errors import KWError, RecipeError
from kw_lightning.planning import find_stages, plan
from kw_lightning.recipe import load_recipe


def layout(planned: Any) -> list[list[str]]:
    """Return the layers of each warehouse."""
    return [[layer.name for layer in warehouse.layers] for warehouse in planned.warehouses]


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_published_resnet_layouts(network: str) -> None:
    automatic = plan(recipe(model={"backbone": f"torchvision/{network}"}, stages="auto"))
    published = plan(load_recipe(f"{network}-kw-1x"))
    assert layout(automatic) == layout(published)
    assert automatic.parameters == published.parameters


def test_layouts_of_timms_resnets() -> None:
    pytest.importorskip("timm")
    automatic = plan(recipe(model={"backbone": "timm/resnet50"}, stages="auto"))
    assert layout(automatic) == layout(plan(load_recipe("resnet50-kw-1x")))


def test_without_handover() -> None:
    with torch.device("meta"):
        model = models.resnet50()
    stages = find_stages(model, [3, 224, 224], handover=False)
    assert [stage.name for stage in stages] == ["stage1", "stage2", "stage3", "stage4"]
    assert [stage.size for stage in stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    for number, stage in enumerate(stages, start=1):
        assert all(name.startswith(f"layer{number}.") for name in stage.layers)
    assert "layer1.0.conv1" in stages[0].layers
    assert "layer3.0.downsample.0" in stages[2].layers


def test_stages_of_a_small_network() -> None:
    with_handover = find_stages(TinyResNet(), [1, 8, 8])
    blocks = ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2")
    assert with_handover[0].layers == (*blocks, "layer2.0.conv1", "layer2.0.shortcut")
    assert find_stages(TinyResNet(), [1, 8, 8], handover=False)[0].layers == blocks


def test_kinds_and_widths_are_kept_apart() -> None:
    with torch.device("meta"):
        model = models.mobilenet_v2()
    stages = {stage.name: stage.layers for stage in find_stages(model, [3, 224, 224])}
    assert stages["stage2-depthwise"] == ("features.2.conv.1.0", "features.3.conv.1.0")
    assert stages["stage5-narrow"] == ("features.14.conv.2", *(f"features.{i}.conv.2" for i in (15, 16, 17)))
    everything = [name for layers in stages.values() for name in layers]
    assert len(everything) == len(set(everything))
    assert "features.0.0" not in everything
    assert "classifier.1" not in everything


def test_a_plain_network_has_no_blocks() -> None:
    with torch.device("meta"):
        model = models.vgg11()
    assert [stage.layers for stage in find_stages(model, [3, 224, 224])] == [
        ("features.3",),
        ("features.6", "features.8"),
        ("features.11", "features.13"),
        ("features.16", "features.18"),
    ]


def test_transformers_are_grouped_by_tokens() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    (stage,) = find_stages(model, [3, 224, 224])
    assert stage.size == (197,)
    assert stage.layers[:3] == ("blocks.0.attn.qkv[2/3:]", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    automatic = plan(recipe(model={"backbone": "timm/deit_tiny_patch16_224"}, stages="auto"))
    assert layout(automatic) == layout(plan(load_recipe("deit-tiny-kw-1x")))


@pytest.mark.parametrize("network", ["densenet201", "efficientnet_b0", "resnet152", "mobilenet_v3_small"])
def test_attention_stays_in_proportion(network: str) -> None:
    """Without the splitting DenseNet201 would have 19 times its parameters."""
    planned = plan(recipe(model={"backbone": f"torchvision/{network}"}, stages="auto"))
    assert planned.parameters.ratio < 5
    shared = [warehouse for warehouse in planned.warehouses if len(warehouse.layers) > 1]
    assert max(warehouse.partition.mixtures for warehouse in shared) <= 256


def test_linear_layers_beside_convolutions() -> None:
    with torch.device("meta"):
        model = models.convnext_tiny()
    stages = {stage.name: stage.layers for stage in find_stages(model, [3, 224, 224])}
    published = {w.name: [x.layer.name for x in w.layers] for w in plan(load_recipe("convnext-tiny-kw-1x")).warehouses}
    assert list(stages["stage1-linear"]) == published["stage1-pointwise"]
    assert list(stages["stage3-linear"]) == published["stage3-pointwise"]
    assert list(stages["stage4-depthwise"]) == published["stage4-depthwise"]


def test_settings_and_exclusions() -> None:
    stages = {"handover": False, "exclude": ["*.shortcut", "layer2.1.*"], "budget": "1/2", "cell": {"out": "1/2"}}
    planned = plan(recipe(stages=stages), TinyResNet(), input_shape=[1, 8, 8])
    assert layout(planned)[1] == ["layer2.0.conv1", "layer2.0.conv2"]
    assert planned.warehouses[1].partition.cell_shape == (8, 8, 1, 1)
    assert float(planned.warehouses[0].budget) == 0.5


def test_beside_warehouses() -> None:
    planned = plan(recipe({"stage1": ["layer1.0.*"]}, stages="auto"), TinyResNet(), input_shape=[1, 8, 8])
    assert [warehouse.name for warehouse in planned.warehouses] == ["stage1", "auto-stage1", "stage2"]
    assert layout(planned)[1] == ["layer1.1.conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.0.shortcut"]


def test_what_cannot_be_found() -> None:
    with pytest.raises(RecipeError, match=r"stages: no stages .* the shape .* is not known; give it by model\.input"):
        plan(recipe(stages="auto"), TinyResNet())
    with pytest.raises(RecipeError, match="the network has no blocks of layers"):
        plan(recipe(stages="auto"), nn.Sequential(nn.Linear(4, 4)), input_shape=[4])
    with pytest.raises(
        RecipeError, match=r'stages\.exclude\[0\]: found "layer9\.\*", allowed: names and globs of layers'
    ):
        plan(recipe(stages={"exclude": ["layer9.*"]}), TinyResNet(), input_shape=[1, 8, 8])
    with pytest.raises(KWError, match="does not run on one input"):
        find_stages(TinyResNet(), [3, 8, 8])
