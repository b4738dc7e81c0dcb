"""The plan: counts, multiply-adds, memory, limits."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import TinyResNet, recipe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.builder import apply_plan, convert
from kw_lightning.errors import RecipeError
from kw_lightning.nn import KWLayer
from kw_lightning.planning import plan
from kw_lightning.planning.macs import attention_macs
from kw_lightning.planning.network import survey
from kw_lightning.planning.tracing import positions, trace
from kw_lightning.recipe import load_recipe

EVERYTHING = {
    "wide": ["layer1.*", "layer2.0.conv1"],
    "norm": {"layers": ["layer2.0.shortcut"], "attention": {"norm": "layer"}},
    "low": {"layers": ["layer2.*.conv2", "layer2.1.conv1"], "attention": {"basis": "1/4"}, "budget": "1/2"},
    "head": ["fc"],
}


def test_counts_are_the_built_networks() -> None:
    model = TinyResNet()
    planned = plan(recipe(EVERYTHING), model)
    assert planned.parameters.static == sum(p.numel() for p in model.parameters())
    apply_plan(planned, model)
    assert planned.parameters.kw == sum(p.numel() for p in model.parameters())


def test_static_macs_against_torch() -> None:
    model = TinyResNet().eval()
    planned = plan(recipe(["*.conv?"]), model, input_shape=[1, 8, 8])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    assert planned.macs is not None
    assert planned.macs.static == counter.get_total_flops() // 2
    forward = trace(model, [1, 8, 8])
    by_layer = 0
    for layer in survey(model).layers:
        for call in forward.calls[layer.name]:
            weight = torch.tensor(layer.kernel_shape).prod().item()
            by_layer += int(weight) * positions(layer.kernel_shape, call.outputs)
    assert by_layer == planned.macs.static


def test_dynamic_macs_against_torch() -> None:
    """The attention's figure is what torch counts; so is the mixing's where kernels are mixed first."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval()
    planned = plan(recipe(["0"]), model, input_shape=[8, 64, 64])
    layer = planned.warehouses[0].layers[0]
    apply_plan(planned, model)
    attention = model[0].attention.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(torch.zeros(1, 8, 64, 64), torch.ones(()))
    by_hand = attention_macs(8, layer.partition, planned.warehouses[0].attention.reduction)
    assert by_hand == counter.get_total_flops() // 2
    assert layer.macs is not None
    assert layer.macs.static == 9 * 64 * 64 * 64
    assert layer.macs.kw == by_hand + 9 * 9 * 64 + layer.macs.static


def test_windows_count_as_samples() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(-1, 2, 4))  # [batch·windows, tokens, channels]

    layer = plan(recipe(["layer"]), Windows(), input_shape=[6, 4]).warehouses[0].layers[0]
    mixing = 4 * 4 * 2 + 4 * 2  # both tokens convolved with the one cell, then the results mixed
    attention = recipe(["*"]).warehouses[0].attention.reduction
    one = mixing + attention_macs(4, layer.partition, attention)
    assert layer.macs == (3 * 2 * 16, 3 * one)


def test_unknown_input_shape_and_networks_that_do_not_run() -> None:
    assert plan(recipe(["fc"]), TinyResNet()).macs is None
    planned = plan(recipe(["fc"]), TinyResNet(), input_shape=[3, 8, 8])
    assert planned.macs is None
    assert planned.macs_note is not None
    assert "does not run on one input of [3, 8, 8]" in planned.macs_note


def test_planning_leaves_the_network_alone() -> None:
    model = TinyResNet().train()
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan(recipe(EVERYTHING), model, input_shape=[1, 8, 8])
    assert not calls
    assert model.training
    assert len(model.fc._forward_hooks) == 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_planning_takes_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    plan(load_recipe("regnety-400mf-kw-1x"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("engine", ["mix_outputs", "mix_inputs"])
def test_an_engine_that_cannot_compute_a_layer_is_refused_with_its_place_and_what_can(
    engine: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(
        f"kw: 1\nname: net\nengine: {engine}\nwarehouses:\n"
        '  a: {layers: ["0"]}\n  b: {layers: ["1"]}\n  c: {layers: ["2"]}\n'
    )
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(RecipeError) as raised:
        convert(model, path)
    assert str(raised.value) == (
        f'{path}:3:9: engine: found "{engine}", which cannot compute "1" [8×1×3×3, 8 groups] and 1 other layer '
        "(its products take all input channels together and know no groups), "
        "allowed: auto, autotune, mix_kernels, reference"
    )
    assert not any(isinstance(module, KWLayer) for module in model)
    path.write_text(path.read_text().replace(engine, "mix_kernels"))
    assert [type(module).__name__ for module in convert(model, path)] == ["KWConv2d"] * 3


def test_reasons_for_static_layers() -> None:
    asked = recipe([{"name": "layer1.*", "exclude": ["*.conv2"]}])
    reasons = {static.layer.name: static.reason for static in plan(asked, TinyResNet()).static_layers}
    assert reasons["layer1.1.conv2"] == 'excluded from warehouse "a" by "*.conv2"'
    assert reasons["fc"] == "no warehouse takes it"
    assert len(reasons) == 9


def test_plan_as_data() -> None:
    planned = plan(recipe({"a": {"layers": ["layer1.*"], "budget": "1/2"}}), TinyResNet(), input_shape=[1, 8, 8])
    data = json.loads(json.dumps(planned.to_dict()))
    assert set(data["parameters"]) == set(data["macs"]) == {"static", "kw"}
    warehouse = data["warehouses"][0]
    assert (warehouse["name"], warehouse["cells"], warehouse["cell_shape"]) == ("a", 18, [8, 8, 1, 1])
    assert (warehouse["mixtures"], warehouse["budget"]) == (36, {"asked": "1/2", "reached": 0.5})
    assert [layer["first_cell"] for layer in warehouse["layers"]] == [0, 5, 10, 15]
    assert {"name": "fc", "type": "Linear", "reason": "no warehouse takes it"} in data["static_layers"]


MEMORY = """
import re
from pathlib import Path
import torch
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

def peak() -> float:
    # Not ru_maxrss, which a process inherits from the one that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

plan(load_recipe("resnet18-kw-1x"))  # what the imports and the first forward pass take
before = peak()
plan(load_recipe("resnet50-kw-4x"))
planned = peak()
weights = torch.ones(102_015_144)
print(planned - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process took at most")
def test_memory_of_a_large_plan() -> None:
    """ResNet50 at 4× has 408 MB of weights: its plan takes none of them."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    planning, weights = map(float, done.stdout.split())
    assert planning < 50
    assert weights > 350  # so the measure sees what is there


ABSURD: list[dict[str, Any]] = [
    {"backbone": "torchvision/resnet18", "args": {"num_classes": 10**9}},
    {"backbone": "torchvision/resnet50", "args": {"width_per_group": 10**5, "num_classes": 10**5}},
    {"backbone": "torchvision/mobilenet_v2", "args": {"width_mult": 1e5}},
    {"backbone": "torchvision/mobilenet_v2", "args": {"width_mult": 1e400}},
    {"backbone": "torchvision/vit_b_16", "args": {"image_size": 99984}},
    {"backbone": "torchvision/resnet18", "input": [3, 10**6, 10**6]},
    {"backbone": "timm/vit_tiny_patch16_224", "args": {"depth": 99_999}},
    {"backbone": "timm/vit_tiny_patch16_224", "args": {"embed_dim": 99_999, "num_heads": 1, "depth": 24}},
    {"backbone": "timm/convnext_tiny", "args": {"depths": [3, 3, 9, 10**9]}},
]


@pytest.mark.parametrize("model", ABSURD, ids=lambda model: str(model)[13:60])
def test_absurd_sizes_are_refused_at_once(model: dict[str, Any]) -> None:
    pytest.importorskip(model["backbone"].partition("/")[0])
    gc.freeze()  # neither its import nor what earlier tests left is part of the time
    started = time.process_time()
    try:
        with pytest.raises(RecipeError, match=r"at most|the most a recipe may ask|Storage size|a finite number"):
            plan(recipe(["*"], model=model))
    finally:
        gc.unfreeze()
    assert time.process_time() - started < 2  # under 1 s on an idle machine; a busy one takes twice the CPU time


@pytest.mark.parametrize(
    ("warehouse", "message"),
    [
        (
            {"layers": ["layer*.conv?"], "cell": {"out": "1/512", "in": "1/512"}},
            "10,985,472 mixtures, allowed: at most 200,000; cell.out and cell.in cut them smaller",
        ),
        ({"layers": ["layer4.1.conv1"], "budget": {"cells": 10**9}}, "more than 10,000,000,000 parameters"),
        ({"layers": ["layer4.1.conv1"], "budget": {"cells": 10**5}, "cell": {"spatial": "whole"}}, "parameters"),
    ],
)
def test_absurd_warehouses_are_refused(warehouse: dict[str, Any], message: str) -> None:
    asked = recipe({"a": warehouse}, model={"backbone": "torchvision/resnet18"})
    with pytest.raises(RecipeError, match=message):
        plan(asked)


def test_recipes_without_network_or_warehouses() -> None:
    with pytest.raises(RecipeError, match="a recipe needs a network here"):
        plan(recipe(["*"]))
    static = plan(recipe(), TinyResNet())
    assert static.warehouses == ()
    assert static.parameters.static == static.parameters.kw


def test_problems_stand_where_the_recipe_has_them(tmp_path: Any) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "kw: 1\nname: wrong\nwarehouses:\n  a:\n    layers: [layer1.*]\n  b:\n    layers:\n    - layer1.0.conv1\n"
    )
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path), TinyResNet())
    assert str(caught.value).startswith(f"{path}:8:7: warehouses.b.layers[0]: layer")
