"""What is done with a folded network: trained on for a few epochs, and turned into whole numbers of eight bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import kw_lightning
from kw_lightning.builder import build
from kw_lightning.cli import application
from kw_lightning.export.calibration import evaluation_images
from kw_lightning.inference import ImageClassifier, SavedNetwork
from kw_lightning.preprocessing import preprocessing
from kw_lightning.recipe import load_recipe

RECIPE = {
    "kw": 1,
    "name": "small",
    "model": {
        "input": [1, 8, 8],
        "layers": [
            {"Conv2D": {"filters": 32, "kernel_size": 3, "padding": "same", "use_bias": False, "warehouse": "stage"}},
            {"BatchNormalization": {}},
            {"ReLU": {}},
            {"MaxPooling2D": {}},
            {"Flatten": {}},
            {"Dense": {"units": 10}},
        ],
    },
    "warehouses": {"stage": {"budget": 1}},
    "data": {"name": "digits", "batch_size": 32, "train": {"samples": 600}, "eval": {"samples": 200}},
    "train": {
        "epochs": 9,
        "max_steps": 1,
        "devices": 1,
        "optimizer": {"lr": 0.1, "no_decay": ["*.attention.*"]},
        "freeze": ["*"],
    },
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE)
    steps = preprocessing(recipe)
    assert steps is not None
    folder = tmp_path_factory.mktemp("folded") / "model"
    classes = tuple(map(str, range(10)))
    ImageClassifier(SavedNetwork(build(recipe).eval(), recipe, steps, classes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(untrained: Path) -> tuple[Path, str]:
    """Return the folded network after some epochs, and what the command printed."""
    target = untrained.parent / "static"
    result = CliRunner().invoke(
        application(), ["export", str(untrained), "--to", "static", "--fit", "4", "--samples", "64", "-o", str(target)]
    )
    assert result.exit_code == 0, result.output
    return target, result.output


def shares(output: str) -> list[float]:
    (line,) = [line for line in output.splitlines() if "all images" in line]
    return [float(cell.strip(" %")) for cell in line.split("│")[2:-1]]


def test_a_folded_network_is_trained_on(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert "static, 4 epochs on" in printed
    dynamic, static, tuned = shares(printed)
    assert max(dynamic, static) < 40 < 80 < tuned
    found = kw_lightning.load(folder)
    assert found.saved.recipe.train is not None
    assert found.saved.recipe.train.epochs == 9  # the recipe stays that of the run


def test_a_folded_network_in_eight_bits(trained: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    folder, _ = trained
    file = tmp_path / "small.onnx"
    result = CliRunner().invoke(application(), ["export", str(folder), "--to", "int8", "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert all(share > 80 for share in shares(result.output))
    graph = onnx.load(str(file)).graph
    assert {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4} == {onnx.TensorProto.INT8}
    assert [node.op_type for node in graph.node if node.op_type == "BatchNormalization"] == []
    found = kw_lightning.load(file)  # its description came through
    assert found.classes == tuple(map(str, range(10)))
    whole = kw_lightning.load(folder)
    images, _ = next(evaluation_images(whole.saved))
    with torch.no_grad():
        exact, rounded = whole(images), found(images)
    assert (rounded - exact).abs().mean() <= 0.1 * exact.std()


def test_fit_belongs_to_folded_networks(untrained: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        application(), ["export", str(untrained), "--to", "onnx", "--fit", "2", "-o", str(tmp_path / "x.onnx")]
    )
    assert result.exit_code == 1
    assert "--fit trains a folded network: --to static or int8" in result.output


@torch.no_grad()
def test_cells_and_attention_take_eight_bits_in_a_file(untrained: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        application(), ["export", str(untrained), "--to", "int8-weights", "-o", str(tmp_path / "small")]
    )
    assert result.exit_code == 0, result.output
    assert all(share < 40 for share in shares(result.output))
    whole, small = ((folder / "model.safetensors").stat().st_size for folder in (untrained, tmp_path / "small"))
    assert small < 0.5 * whole  # names and small tensors weigh much in so small a network
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    packed = [key for key, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert any("attention" in key for key in packed)
    assert [key for key in packed if key.endswith("warehouse.cells")] != []
    before, after = kw_lightning.load(untrained), kw_lightning.load(tmp_path / "small")
    exact = before.network.state_dict()
    for key, tensor in after.network.state_dict().items():
        if key in packed:
            step = exact[key].flatten(1).abs().amax(1, keepdim=True) / 127
            assert ((tensor - exact[key]).flatten(1).abs() <= 0.501 * step).all()
            assert not torch.equal(tensor, exact[key])
        else:
            assert torch.equal(tensor, exact[key])
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(after(x), before(x), atol=0.05 * float(before(x).std()))
