"""Vision transformers and templates: each plans, builds, and trains a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.builder import build
from kw_lightning.nn import set_temperature
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

# DeiT: cells of 108 mixtures, parameters; both from the shapes by hand: 12 · (1 + 4 + 4) mixtures of width².
DEIT = {"tiny": (192, 5_717_416), "small": (384, 22_050_664)}


def train_a_step(model: nn.Module, *inputs: Any) -> None:
    """Train one step and hold every parameter to a finite gradient."""
    torch.manual_seed(0)
    model.train()
    set_temperature(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    output = model(*inputs)
    if isinstance(output, Tensor):
        loss = nn.functional.cross_entropy(output, torch.tensor([0, 1]))
    elif "out" in output:  # segmentation
        loss = nn.functional.cross_entropy(output["out"], torch.ones(2, *inputs[0].shape[-2:], dtype=torch.int64))
    else:  # a detector's own losses
        loss = sum(output.values())
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("size", DEIT)
def test_deit_shares_the_cells_of_all_its_blocks_and_trains(size: str, budget: int) -> None:
    pytest.importorskip("timm")
    width, static = DEIT[size]
    name = f"deit-{size}-kw-{budget}x"
    planned = plan(load_recipe(name))
    warehouse = planned.warehouses[0]
    assert (warehouse.partition.mixtures, warehouse.partition.cells) == (108, 108 * budget)
    assert warehouse.partition.cell_shape == (width, width)
    assert planned.parameters.static == static
    assert planned.parameters.kw == static + 108 * (budget - 1) * width**2 + warehouse.attention_parameters
    assert len(warehouse.layers) == 36
    assert {layer.rows for layer in warehouse.layers if "qkv" in layer.name} == {(2 * width, 3 * width)}
    model = build(load_recipe(name, ["model.args.img_size=32", "model.args.depth=2"]))
    assert isinstance(model.blocks[0].attn.qkv, PartialLayer)
    train_a_step(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "warehouses", "layers"),
    [
        ("efficientnet-b0-kw-1x", 15, 42),
        ("regnety-400mf-kw-1x", 9, 48),
        ("swin-tiny-kw-1x", 4, 24),
    ],
)
def test_templates_of_classifiers_plan_and_train(name: str, warehouses: int, layers: int) -> None:
    planned = plan(load_recipe(name))
    assert (len(planned.warehouses), sum(len(w.layers) for w in planned.warehouses)) == (warehouses, layers)
    assert planned.parameters.ratio < 1.4  # attention does not outgrow the network
    train_a_step(build(load_recipe(name)), torch.randn(2, 3, 64, 64))


def test_the_template_of_segmentation_plans_and_trains() -> None:
    planned = plan(load_recipe("deeplabv3-resnet50-kw-1x"))
    assert [w.partition.cells for w in planned.warehouses] == [87, 104, 138, 47]
    train_a_step(build(load_recipe("deeplabv3-resnet50-kw-1x")), torch.randn(2, 3, 64, 64))


def test_the_template_of_detection_plans_and_trains() -> None:
    recipe = load_recipe("faster-rcnn-resnet50-kw-1x", ["model.args.min_size=64", "model.args.max_size=96"])
    assert [w.partition.cells for w in plan(recipe).warehouses] == [87, 104, 138, 47]
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    train_a_step(build(recipe), [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [boxes, boxes])
