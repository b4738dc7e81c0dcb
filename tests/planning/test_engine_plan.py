"""`kw plan --engine`: the problem that each layer poses, which path runs, and why no other."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kw_lightning.builder import convert
from kw_lightning.cli import application
from kw_lightning.nn.engine import native, planner, training
from kw_lightning.nn.engine.paths import PATHS
from kw_lightning.nn.engine.paths.mix_kernels.along_rank import AlongRank
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.planning import plan
from kw_lightning.planning.engine import plan_engine
from kw_lightning.recipe import load_recipe


class Windows(nn.Module):
    """Four windows of an image, folded into the batch, as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(2, (2, -1)).unflatten(4, (2, -1)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        return self.first(windows).mean(1).unflatten(0, (-1, 4)).mean(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 8, (4, 3), padding="same"),  # unequal sides
        nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 1, padding="valid"),
        Windows(),
        nn.Linear(16, 4),
    )


RECIPE = {
    "kw": 1,
    "name": "net",
    "warehouses": {
        "convolutions": {"layers": ["0", "2", "3", "5"]},
        "long": {"layers": ["1"]},
        "depthwise": {"layers": ["4"]},
        "linear": {"layers": ["6.first", "7[1/4:3/4]"]},
    },
}


def test_the_plan_poses_the_problems_that_the_network_hands_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_engine(plan(load_recipe(RECIPE), network(), input_shape=(4, 10, 12)), batch=3)
    posed: list[Problem] = []
    ask, rank = planner.ask, planner.rank

    def watch(*arguments: Any, backward: bool) -> tuple[Problem, str]:
        asked = ask(*arguments, backward=backward)
        posed.append(asked[0])
        return asked

    net = network()
    convert(net, RECIPE)
    for module in (planner, training):
        monkeypatch.setattr(module, "ask", watch)
    net(torch.randn(3, 4, 10, 12)).sum().backward()
    named = {name: layer.problem for layer in planned.layers for name in layer.names}
    assert sorted(named) == ["0", "1", "2", "3", "4", "5", "6.first", "7[1:3]"]
    assert {problem for problem in posed if not problem.backward} == set(named.values())
    assert {problem._replace(backward=False) for problem in posed if problem.backward} == set(named.values())
    for layer in planned.layers:
        assert layer.chosen == (rank(layer.problem, "auto")[0], rank(layer.problem._replace(backward=True), "auto")[0])


def test_every_path_of_every_layer_is_told_with_its_time_or_the_reason_against_it() -> None:
    result = CliRunner().invoke(application(), ["plan", "mobilenetv2-050-kw-1x", "--engine", "--batch", "2"])
    assert result.exit_code == 0, result.output
    head, *blocks = result.output.strip().split("\n\n")
    assert head == "engine: auto; a batch of 2 samples, float32 on cpu"
    *layers, total = blocks
    assert total.startswith("all dynamic layers without their attention: forward ")
    for block in layers:
        title, table, *lines = block.splitlines()
        assert "input 2 × " in title
        assert table.split() == ["path", "forward", "backward"]
        assert block.count("*") == 2
        assert all(len(re.findall(rf"{path.name}\b", block)) == 1 for path in PATHS)
        refusals = [line for line in lines if line.startswith("  not ")]
        assert refusals
        assert all(": " in line for line in refusals)
    (depthwise,) = [block for block in layers if block.startswith("features.1.conv.0.0:")]
    assert "16×1×3×3 in 16 groups" in depthwise
    assert "mix_outputs/by_cell" in depthwise
    assert "know no groups" in depthwise


@pytest.mark.skipif(not native.available(), reason="needs a C compiler")
def test_the_path_along_the_rank_is_told_with_its_time_or_why_it_cannot() -> None:
    lines = {}
    for function in ("contrast", "softmax"):
        arguments = ["resnet18-kw-4x", f"defaults.attention.function={function}", "--engine", "--batch", "128"]
        output = CliRunner().invoke(application(), ["plan", *arguments]).output
        lines[function] = [line for line in output.splitlines() if AlongRank.name in line]
        assert len(lines[function]) > 8
    assert all(line.startswith(f"  {AlongRank.name} ") and line.count(" ms") == 2 for line in lines["contrast"])
    assert any(line.count("*") == 2 for line in lines["contrast"])
    assert all("the factors of the attention are not at hand" in line for line in lines["softmax"])


def test_as_json_it_stands_beside_the_plan() -> None:
    result = CliRunner().invoke(application(), ["plan", "resnet18-kw-1x", "--engine", "--json", "engine=mix_inputs"])
    found = json.loads(result.output)
    assert found["name"] == "resnet18-kw-1x"
    engine = found["engine"]
    assert (engine["engine"], engine["batch"], engine["note"]) == ("mix_inputs", 1, None)
    assert sum(len(layer["names"]) for layer in engine["layers"]) == sum(len(w["layers"]) for w in found["warehouses"])
    for layer in engine["layers"]:
        for direction in ("forward", "backward"):
            assert {choice["path"].partition("/")[0] for choice in layer[direction]} == {"mix_inputs"}
            assert layer[direction][0]["seconds"] > 0
            assert layer[direction][-1]["refusal"]


@pytest.mark.parametrize(
    ("recipe", "shape", "note"),
    [
        (RECIPE | {"engine": "reference"}, (4, 10, 12), "the literal form is computed, and no path chosen"),
        (RECIPE, None, "the shape of the input is not known"),
    ],
)
def test_where_no_path_can_be_told_it_says_why(recipe: Any, shape: Any, note: str) -> None:
    found = plan_engine(plan(load_recipe(recipe), network(), input_shape=shape))
    assert (found.layers, found.note) == ((), note)


def test_a_batch_without_the_engine_is_refused() -> None:
    result = CliRunner().invoke(application(), ["plan", "resnet18-kw-1x", "--batch", "4"])
    assert result.exit_code == 2
    assert "--engine" in result.output
