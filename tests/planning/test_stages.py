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


def wide() -> TinyResNet:
    """Return a network as wide as ResNets are: in a narrower one, layers are grouped by shape."""
    with torch.device("meta"):
        return TinyResNet(width=128)


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


def test_without_handover_a_stage_has_all_layers_of_its_size() -> None:
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
    with_handover = find_stages(wide(), [1, 8, 8])
    blocks = ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2")
    assert with_handover[0].layers == (*blocks, "layer2.0.conv1", "layer2.0.shortcut")
    assert find_stages(wide(), [1, 8, 8], handover=False)[0].layers == blocks


def test_kinds_and_widths_are_kept_apart() -> None:
    with torch.device("meta"):
        model = models.mobilenet_v2()
    stages = {stage.name: stage.layers for stage in find_stages(model, [3, 224, 224])}
    assert stages["stage5-narrow"] == ("features.14.conv.2", *(f"features.{i}.conv.2" for i in (15, 16, 17)))
    assert stages["stage4-narrow96"] == tuple(f"features.{i}.conv.2" for i in (11, 12, 13))
    everything = [name for layers in stages.values() for name in layers]
    assert len(everything) == len(set(everything))
    assert "features.0.0" not in everything
    assert "classifier.1" not in everything


def test_layers_smaller_than_an_attention_stay_static_and_the_plan_says_why() -> None:
    planned = plan(recipe(model={"backbone": "torchvision/mobilenet_v2"}, stages="auto"))
    reasons = {static.layer.name: static.reason for static in planned.static_layers}
    assert reasons["features.2.conv.1.0"] == "its attention would outweigh it: 1,602 parameters beside 864"
    assert reasons["features.0.0"] == "no warehouse takes it"
    assert planned.warning is None


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


@pytest.mark.parametrize("network", ["densenet201", "efficientnet_b0", "resnet152", "mobilenet_v3_small", "googlenet"])
def test_attention_stays_in_proportion(network: str) -> None:
    """Without the grouping DenseNet201 would have 19 times its parameters."""
    planned = plan(recipe(model={"backbone": f"torchvision/{network}"}, stages="auto"))
    assert planned.parameters.ratio < 1.4
    assert all(w.attention_parameters <= w.cell_parameters for w in planned.warehouses)
    assert len(planned.warehouses) < 0.7 * sum(len(warehouse.layers) for warehouse in planned.warehouses)


@pytest.mark.parametrize("growth", [8, 12])
def test_narrow_dense_networks_stay_in_proportion(growth: int) -> None:
    with torch.device("meta"):
        model = models.DenseNet(growth, (6, 12, 24, 16), num_init_features=2 * growth)
    assert plan(recipe(stages="auto"), model, input_shape=[3, 64, 64]).parameters.ratio < 1.5


def test_layers_on_tokens_and_on_channels_in_turn_are_two_groups() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Sequential(nn.Linear(196, 384), nn.GELU(), nn.Linear(384, 196))
            self.channels = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x: [batch, tokens, channels]."""
            x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
            return x + self.channels(x)

    with torch.device("meta"):
        model = nn.Sequential(*(Mixer() for _ in range(6)))
    stages = find_stages(model, [196, 256])
    assert len(stages) <= 4
    assert sorted(name for stage in stages for name in stage.layers) == sorted(
        f"{block}.{part}.{layer}" for block in range(6) for part in ("tokens", "channels") for layer in (0, 2)
    )


def test_convolutions_of_several_dimensions_have_warehouses_of_their_own() -> None:
    class Block(nn.Module):
        """A squeeze over one dimension beside convolutions over two, both of the same block."""

        def __init__(self) -> None:
            super().__init__()
            self.spatial = nn.Conv2d(64, 64, 3, padding=1)
            self.line = nn.Conv1d(64, 64, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.spatial(x)
            return x + self.line(x.flatten(2)).view_as(x)

    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 64, 1), Block(), Block(), Block())
    planned = plan(recipe(stages="auto"), model, input_shape=[3, 8, 8])
    assert layout(planned) == [["1.spatial", "2.spatial", "3.spatial"], ["1.line", "2.line", "3.line"]]


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
    planned = plan(recipe(stages=stages), wide(), input_shape=[1, 8, 8])
    assert layout(planned)[1] == ["layer2.0.conv1", "layer2.0.conv2"]
    assert planned.warehouses[1].partition.cell_shape == (128, 128, 1, 1)
    assert float(planned.warehouses[0].budget) == 0.5


def test_stages_take_the_layers_that_warehouses_leave() -> None:
    planned = plan(recipe({"stage1": ["layer1.0.*"]}, stages="auto"), wide(), input_shape=[1, 8, 8])
    assert [warehouse.name for warehouse in planned.warehouses] == ["stage1", "auto-stage1", "stage2"]
    assert layout(planned)[1] == ["layer1.1.conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.0.shortcut"]


def test_what_cannot_be_found() -> None:
    with pytest.raises(RecipeError, match=r"stages: no stages .* the shape .* is not known; give it by model\.input"):
        plan(recipe(stages="auto"), wide())
    reason = r"no stages to be found: no layer is left for one \(1 of 1 layers: a linear layer that serves no positions"
    with pytest.raises(RecipeError, match=reason):
        plan(recipe(stages="auto"), nn.Sequential(nn.Linear(4, 4)), input_shape=[4])
    with pytest.raises(
        RecipeError, match=r'stages\.exclude\[0\]: found "layer9\.\*", allowed: names and globs of layers'
    ):
        plan(recipe(stages={"exclude": ["layer9.*"]}), wide(), input_shape=[1, 8, 8])
    with pytest.raises(KWError, match="does not run on one input"):
        find_stages(wide(), [3, 8, 8])


def test_why_no_layer_belongs_to_a_stage() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input / 2)

    own = nn.Sequential(*(Standardised(8, 8, 3) for _ in range(3)))  # as in NFNet
    with pytest.raises(RecipeError, match="3 of 3 layers: Standardised is a Conv2d with a forward pass of its own"):
        plan(recipe(stages="auto"), own, input_shape=[8, 16, 16])
    generator = nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.ConvTranspose2d(8, 3, 4))  # as in DCGAN
    with pytest.raises(RecipeError, match="2 of 2 layers: ConvTranspose2d is no Conv1d, Conv2d, Conv3d or Linear"):
        plan(recipe(stages="auto"), generator, input_shape=[8, 4, 4])
    with pytest.raises(RecipeError, match="the network has no Conv1d, Conv2d, Conv3d or Linear"):
        plan(recipe(stages="auto"), nn.Sequential(nn.ReLU()), input_shape=[8, 4, 4])


@pytest.mark.parametrize(
    "network",
    ["fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large", "raft_small", "r3d_18", "fcn_resnet50"],
)
def test_networks_of_other_tasks_have_stages(network: str) -> None:
    planned = plan(recipe(model={"backbone": f"torchvision/{network}"}, stages="auto"))
    assert planned.warehouses
    assert planned.parameters.ratio < 2
    decided = network.startswith(("faster", "ssd"))
    assert (planned.macs is None) == decided
    assert ("values decide which way" in (planned.macs_note or "")) == decided


def test_a_share_that_no_cell_has_leaves_layers_static_and_says_why() -> None:
    data = {
        "kw": 1,
        "model": {"backbone": "torchvision/squeezenet1_1"},
        "defaults": {"cell": {"out": "1/3"}},
        "warehouses": {"a": {"layers": ["features.0"], "cell": {"out": 1}}},
        "stages": "auto",
    }
    reasons = {static.layer.name: static.reason for static in plan(load_recipe(data)).static_layers}
    expected = "no cell of the shares that stages.cell asks for divides its kernel, 64×16×1×1"
    assert reasons["features.3.expand1x1"] == expected
