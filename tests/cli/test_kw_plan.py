"""`kw plan`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torchvision
from typer.testing import CliRunner

from kw_lightning.cli import application

run = CliRunner().invoke


def test_table_of_a_shipped_recipe() -> None:
    result = run(application(), ["plan", "resnet18-kw-1d2x"])
    assert result.exit_code == 0
    assert "7,431,044" in result.output
    assert "layer2.0.downsample.0" in result.output
    assert "static: conv1, fc (no warehouse takes it)" in result.output
    assert "\x1b" not in result.output  # plain in a pipe
    assert "─" not in result.output


def test_overrides_and_json() -> None:
    result = run(application(), ["plan", "resnet18-kw-1x", "warehouses.stage4.budget=1/3", "--json"])
    assert result.exit_code == 0
    data = json.loads(result.output)
    assert [warehouse["cells"] for warehouse in data["warehouses"]] == [56, 47, 47, 9]
    assert data["parameters"]["static"] == 11_689_512
    assert data["macs"]["static"] == 1_814_073_344


def test_mistakes_have_a_place_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "kw: 1\nname: wrong\nmodel: {backbone: torchvision/resnet18}\n"
        "warehouses:\n  a:\n    layers: [layer9.conv1]\n  b:\n    layers: [bn1]\n"
    )
    result = run(application(), ["plan", str(path)])
    assert result.exit_code == 2
    assert f'{path}:6:14: warehouses.a.layers[0]: found the unknown name "layer9.conv1", allowed: ' in result.stderr
    assert f"{path}:8:14: warehouses.b.layers[0]:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_warm_start_says_how_near_each_warehouse_comes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    recipe = tmp_path / "warm.yaml"
    recipe.write_text(
        f"kw: 1\nmodel: {{backbone: torchvision/resnet18, pretrained: {weights}}}\n"
        "warehouses:\n  a: {layers: ['layer1.*.conv*'], budget: 1}\n  b: {layers: ['layer2.1.conv*'], budget: 1/4}\n"
    )
    result = run(application(), ["plan", str(recipe), "--warm-start", "temperature.start=1"])
    assert result.exit_code == 0, result.output
    assert "warm start's error" in result.output
    data = json.loads(run(application(), ["plan", str(recipe), "--warm-start", "--json"]).output)
    assert data["warm_start"]["a"] == 0
    assert 0.5 < data["warm_start"]["b"] < math.sqrt(14 / 18)  # what keeping 4 of 18 parts leaves
    refused = run(application(), ["plan", "resnet18-kw-1x", "--warm-start"])
    assert refused.exit_code == 1
    assert "model.pretrained names no weights" in refused.output
