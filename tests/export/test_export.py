"""Networks on their way out: ONNX in onnxruntime, PyTorch's exported program, and folding into a static network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import kw_lightning
from kw_lightning.builder import build
from kw_lightning.cli import application
from kw_lightning.errors import KWError, RunError
from kw_lightning.export import compare, fold, write_onnx, write_program
from kw_lightning.inference import ImageClassifier, SavedNetwork
from kw_lightning.nn import KWLayer, set_temperature
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe

RECIPE = {
    "kw": 1,
    "name": "small",
    "model": {
        "input": [3, 12, 12],
        "layers": [
            {"Conv2D": {"filters": 8, "kernel_size": 3, "strides": 2, "padding": "same", "warehouse": "stage"}},
            {"BatchNormalization": {}},
            {"ReLU": {}},
            {"DepthwiseConv2D": {"kernel_size": 3, "padding": "same", "warehouse": "depthwise"}},
            {"Conv2D": {"filters": 8, "kernel_size": 1, "warehouse": "stage"}},
            {"GlobalAveragePooling2D": {}},
            {"Dense": {"units": 4, "warehouse": "head"}},
        ],
    },
    "warehouses": {"stage": {"budget": 1}, "depthwise": {"budget": 2}, "head": {"budget": 1}},
}


@pytest.fixture(scope="module")
def saved() -> SavedNetwork:
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE)
    network = build(recipe).eval()
    set_temperature(network, 0.2)
    steps = Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 12, None, "none", "bilinear", "a test", channels=3)
    return SavedNetwork(network, recipe, steps, ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def onnx_file(saved: SavedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    assert write_onnx(saved, path) == "batch and size"
    return path


def test_onnx_takes_every_batch_and_size(saved: SavedNetwork, onnx_file: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(onnx_file))
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for batch, side in ((1, 12), (2, 15), (7, 12)):
        x = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = saved.network(x)
        (found,) = session.run(None, {"images": x.numpy()})
        assert np.abs(found - expected.numpy()).max() <= 1e-4


def test_onnx_is_made_of_the_standards_own_operators(onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(onnx_file))
    assert {node.domain for node in model.graph.node} == {""}
    fixed = {tensor.name for tensor in model.graph.initializer}
    assert all(node.input[1] in fixed for node in model.graph.node if node.op_type == "Conv")
    assert [entry.version >= 18 for entry in model.opset_import if entry.domain == ""] == [True]


def test_onnxruntime_prepares_the_file_for_its_quantization(
    saved: SavedNetwork, onnx_file: Path, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime", minversion="1.31")
    preparing = pytest.importorskip("onnxruntime.quantization.shape_inference")
    prepared = tmp_path / "prepared.onnx"
    preparing.quant_pre_process(onnx_file, prepared, auto_merge=True)
    x = torch.randn(3, 3, 12, 12)
    (found,) = runtime.InferenceSession(str(prepared)).run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), saved.network(x), rtol=1e-4, atol=1e-4)


def test_onnx_predicts_as_the_network_does(saved: SavedNetwork, onnx_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = kw_lightning.load(onnx_file)
    assert found.classes == saved.classes
    expected = ImageClassifier(saved).predict(tmp_path / "image.png", top=4)
    assert dict(found.predict(tmp_path / "image.png", top=4).top) == pytest.approx(dict(expected.top), abs=1e-5)


def test_latency_of_a_file_stands_beside_its_networks(onnx_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def bench(*arguments: str | Path) -> Result:
        return CliRunner().invoke(application(), ["bench", *map(str, arguments), "--repeats", "1", "--batch", "2"])

    printed = bench("--exported", onnx_file, "--json")
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found["input"] == [2, 3, 12, 12]
    names = [row["name"] for row in found["exported"]]
    assert names == ["PyTorch, static", "PyTorch, this engine", f"onnxruntime, {onnx_file.name}"]
    assert found["exported"][0]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in found["exported"])
    table = bench("--exported", onnx_file, "--size", "15").stdout
    assert "inference of 2×3×15×15" in table
    assert re.search(r"onnxruntime, small\.onnx +[\d.]+ ms +[\d.]+ ×", table)
    assert "found a file that ends in" in bench("--exported", tmp_path / "net.pt2").output
    assert "give it, or recipes" in bench("resnet18-kw-1x", "--exported", onnx_file).output


def test_another_onnx_file_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "other.onnx").write_bytes(b"no model")
    with pytest.raises(RunError, match=r"other\.onnx: not an ONNX file, or a damaged one"):
        kw_lightning.load(tmp_path / "other.onnx")


RUN = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert "kw_lightning" not in sys.modules
print(program.module()(torch.ones(3, 3, 14, 14)).flatten().tolist())
"""


def test_exported_program_runs_without_this_package(saved: SavedNetwork, tmp_path: Path) -> None:
    write_program(saved, tmp_path / "small.pt2")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "small.pt2")], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = saved.network(torch.ones(3, 3, 14, 14))
    found = torch.tensor([float(number) for number in done.stdout.strip("[] \n").split(",")])
    assert torch.allclose(found.reshape(3, 4), expected, atol=1e-5)


def test_folded_network_is_exact_where_attention_is_the_mean(saved: SavedNetwork) -> None:
    image = torch.randn(1, 3, 12, 12)
    folded = fold(saved, [image.repeat(4, 1, 1, 1)])
    assert not any(isinstance(module, KWLayer) for module in folded.network.modules())
    with torch.no_grad():
        assert torch.allclose(folded.network(image), saved.network(image), atol=1e-5)
    assert any(isinstance(module, KWLayer) for module in saved.network.modules())


def test_folded_network_is_saved_and_loaded_as_a_static_one(saved: SavedNetwork, tmp_path: Path) -> None:
    folded = fold(saved, [torch.randn(8, 3, 12, 12)])
    ImageClassifier(folded).save_pretrained(tmp_path / "static")
    found = kw_lightning.load(tmp_path / "static")
    assert {type(module).__name__ for module in found.network.modules() if hasattr(module, "weight")} == {
        "Conv2d",
        "BatchNorm2d",
        "Linear",
    }
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(found(x), folded.network(x), atol=1e-6)


def test_nothing_to_fold_or_to_calibrate_with_is_said(saved: SavedNetwork) -> None:
    with pytest.raises(KWError, match="no calibration image reached the layers"):
        fold(saved, [])
    folded = fold(saved, [torch.randn(2, 3, 12, 12)])
    with pytest.raises(KWError, match="static already"):
        fold(folded, [torch.randn(2, 3, 12, 12)])


def test_accuracy_is_counted_per_class() -> None:
    class Answers(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()

    said = torch.tensor([0, 1, 1, 2]).reshape(4, 1, 1, 1).float()
    (found,) = compare({"net": Answers()}, [(said, torch.tensor([0, 1, 2, 2]))], 3).values()
    assert found.overall == 0.75
    assert found.classes == pytest.approx((1.0, 1.0, 0.5))


def test_answers_of_several_labels_are_counted_one_by_one() -> None:
    logits = torch.tensor([[0.4, -3.0], [2.0, 0.9]])  # 0.4 is a yes, as a logit
    several = compare({"net": nn.Identity()}, [(logits, torch.tensor([[1.0, 0], [1, 0]]))], 2, several=True)
    assert several["net"].overall == 0.75
    assert several["net"].classes == pytest.approx((1.0, 0.5))


def test_whole_numbers_are_divided_as_python_divides_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Shorter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.new_ones(x.shape[0], 20 + (3 - x.shape[2]) // 2) * self.start

    recipe = load_recipe({**RECIPE, "model": {**RECIPE["model"], "input": [3, 12, 12]}})
    write_onnx(SavedNetwork(Shorter(), recipe, Preprocessing(), ("a",)), tmp_path / "shorter.onnx")
    session = runtime.InferenceSession(str(tmp_path / "shorter.onnx"))
    for side in (3, 4, 8, 9):
        (found,) = session.run(None, {"images": np.zeros((2, 3, side, side), np.float32)})
        assert found.shape == (2, 20 + (3 - side) // 2)
