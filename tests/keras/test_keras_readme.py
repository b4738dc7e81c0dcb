"""The guide's example, commands and table of layers are what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import keras_models
import pytest
import yaml
from typer.testing import CliRunner

from kw_lightning.builder import build
from kw_lightning.cli import application
from kw_lightning.keras import LAYERS, read_network
from kw_lightning.keras.reference import END, START, updated, vocabulary_table
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

README = Path(__file__).parents[2] / "recipes" / "keras" / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("  #")[0] for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_the_example_of_the_page_is_a_network() -> None:
    (text,) = (text for kind, text in BLOCKS if kind == "yaml")
    recipe = load_recipe(yaml.safe_load(text))
    network = read_network(recipe)
    assert network.output_shape == (10,)
    assert "stage1.0.conv_a" in network.warehouses["stage1"]
    assert sum(p.numel() for p in build(recipe).parameters()) == plan(recipe).parameters.kw


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_bytes((keras_models.DATA / "residual_images.json").read_bytes())
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "kw"
        result = CliRunner().invoke(application(), arguments)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "my-network.yaml").is_file()


def test_the_table_of_shipped_networks_has_their_parameters() -> None:
    rows = re.findall(r"^\| `(keras-\S+)` \| ([\d,]+),.*?`(keras-\S+)`: ([\d,]+\d)", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for static, parameters, dynamic, kw in rows:
        assert f"{read_network(load_recipe(static)).parameters:,}" == parameters
        assert f"{plan(load_recipe(dynamic)).parameters.kw:,}" == kw


def test_table_of_layers_is_that_of_the_vocabulary() -> None:
    table = TEXT.partition(START)[2].partition(END)[0].strip()
    assert table == vocabulary_table(), "run: python -m kw_lightning.keras.reference"
    assert len(table.splitlines()) == len(LAYERS) + 2
    assert updated(TEXT.replace(table, "an old table")) == TEXT


def test_plan_prints_the_summary() -> None:
    result = CliRunner().invoke(application(), ["plan", "keras-resnet18-kw-1x"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["layer", "type", "output", "shape", "parameters", "connected", "to", "warehouse"] in lines
    assert ["layer2.0.conv2", "Conv2D", "128,", "28,", "28", "147,456", "layer2.0.re_lu", "stage2"] in lines
    assert ["layer2.0.add", "Add", "128,", "28,", "28", "0", "layer2.0.bn2,", "layer2.0.downsample.1"] in lines
    assert ["static", "network", "11,689,512", "parameters"] in lines
