"""`stages.sharing` and `stages.split`: how far a warehouse reaches, in one key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import TinyResNet, recipe
from torch import Tensor, nn
from torchvision import models

from kw_lightning.errors import RecipeError
from kw_lightning.planning import Plan, plan
from kw_lightning.planning.table import total_lines


def reaching(sharing: str | None, model: nn.Module | None = None, **stages: Any) -> Plan:
    """Return the plan of a small residual network, as wide as ResNets are, at one reach."""
    if model is None:
        with torch.device("meta"):
            model = TinyResNet(width=64)
    given = {} if sharing is None else {"sharing": sharing}
    return plan(recipe(stages={**given, **stages}), model, input_shape=[1, 8, 8])


def attention(planned: Plan) -> int:
    return sum(warehouse.attention_parameters for warehouse in planned.warehouses)


def layout(planned: Plan) -> dict[str, list[str]]:
    return {warehouse.name: [layer.name for layer in warehouse.layers] for warehouse in planned.warehouses}


def test_attention_shrinks_as_sharing_narrows() -> None:
    plans = [reaching(sharing) for sharing in ("network", "stage", "block", "layer")]
    sizes = [attention(planned) for planned in plans]
    assert sizes == sorted(set(sizes), reverse=True)
    assert [len(planned.warehouses) for planned in plans] == [1, 2, 4, 9]
    cells = {sum(warehouse.cell_parameters for warehouse in planned.warehouses) for planned in plans}
    assert len(cells) == 1, "the kernels' numbers are the same at a budget of 1, wherever they are shared"
    first, second = total_lines(plans[3])[:2]
    assert f"attention {sizes[3]:,}" in first
    assert second.startswith("parameters")


def test_every_reach_takes_the_same_layers() -> None:
    found = [
        sorted(name for layers in layout(reaching(sharing)).values() for name in layers)
        for sharing in ("network", "stage", "block", "layer")
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert "stem" not in found[0]


def test_blocks_and_layers_name_their_warehouses() -> None:
    assert layout(reaching("block"))["layer2-0"] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut"]
    assert layout(reaching("layer"))["layer1-1-conv2"] == ["layer1.1.conv2"]
    assert list(layout(reaching("network"))) == ["network"]


def test_stages_without_the_key_are_divided_and_with_it_are_kept() -> None:
    with torch.device("meta"):
        model = models.mobilenet_v2()
    divided = plan(recipe(stages="auto"), model, input_shape=[3, 64, 64])
    kept = plan(recipe(stages={"sharing": "stage", "handover": False}), model, input_shape=[3, 64, 64])
    assert divided.warning is None
    assert kept.warning is not None
    assert ", or narrow stages.sharing; attention.at_most" in kept.warning
    names = {static.layer.name for static in kept.static_layers}
    assert names == {"features.0.0", "classifier.1"}, "what is asked for is not left static either"
    assert {"stage2", "stage2-depthwise"} <= set(layout(kept))


def test_blocks_are_what_stands_in_a_row() -> None:
    """Not the inner MLP of a ConvNeXt block, nor the whole stage around it."""
    with torch.device("meta"):
        model = models.convnext_tiny()
    found = layout(plan(recipe(stages={"sharing": "block"}), model, input_shape=[3, 64, 64]))
    assert found["features-1-0-linear"] == ["features.1.0.block.3", "features.1.0.block.5"]
    assert found["features-1-0-depthwise"] == ["features.1.0.block.0"]


class Stage(nn.Module):
    """Units of one class as plain attributes, as in RegNets, with no more between them."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.names = [f"b{number}" for number in range(1, units + 1)]
        for number, name in enumerate(self.names):
            unit = models.resnet.BasicBlock(channels // 2, channels, 2, Shrinking(channels // 2, channels))
            setattr(self, name, unit if number == 0 else models.resnet.BasicBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels / 2, height, width]."""
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Shrinking(nn.Module):
    """A way past the first unit; its layer is no block by itself."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, in_channels, height, width]."""
        return self.conv(x)


class Staged(nn.Module):
    """A network of such stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.s1, self.s2 = nn.Conv2d(3, 16, 3, padding=1), Stage(32, 1), Stage(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, height, width]."""
        return self.s2(self.s1(self.stem(x)))  # type: ignore[no-any-return]


def test_a_stage_of_blocks_is_no_block_where_they_are_plain_attributes() -> None:
    with torch.device("meta"):
        model = Staged()
    found = layout(plan(recipe(stages={"sharing": "block"}), model, input_shape=[3, 16, 16]))
    assert list(found) == ["s1", "s2-b1", "s2-b2", "s2-b3"]
    assert [len(layers) for layers in found.values()] == [3, 3, 2, 2]


def test_kernels_of_unequal_sizes_are_kept_apart() -> None:
    together = layout(reaching("stage"))
    apart = layout(reaching("stage", split="kernel_size"))
    assert together["stage1"] == [*apart["stage1-3x3"], "layer2.0.shortcut"]
    assert apart["stage1-1x1"] == ["layer2.0.shortcut"]
    assert apart["stage2"] == together["stage2"]
    automatic = layout(reaching(None, split="kernel_size"))
    assert not any("layer2.0.shortcut" in layers and len(layers) > 1 for layers in automatic.values())


def test_whole_cells_of_several_sizes_are_refused_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match=r"stages: unsplit cells .* found 1×1, 3×3; .* stages\.split: kernel_size"):
        reaching("network", cell={"spatial": "whole"})
    planned = reaching("network", cell={"spatial": "whole"}, split="kernel_size")
    assert [warehouse.partition.cell_shape[2:] for warehouse in planned.warehouses] == [(3, 3), (1, 1)]


def test_names_that_are_no_names_of_warehouses() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    found = layout(plan(recipe(stages={"sharing": "layer"}), model, input_shape=[8, 9, 9]))
    assert found == {"layer-1": ["1"], "layer-2": ["2"]}


def test_a_wrong_reach_is_told_with_what_is_allowed() -> None:
    with pytest.raises(RecipeError, match=r"stages\.sharing.*found \"stages\".*network, stage, block, layer"):
        recipe(stages={"sharing": "stages"})
