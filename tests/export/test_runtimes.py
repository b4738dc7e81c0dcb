"""Other runtimes, where they are installed: OpenVINO and ExecuTorch against PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import kw_lightning
from kw_lightning.builder import build
from kw_lightning.errors import RunError
from kw_lightning.export import write_executorch, write_openvino
from kw_lightning.inference import SavedNetwork
from kw_lightning.nn import set_temperature
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
            {"GlobalAveragePooling2D": {}},
            {"Dense": {"units": 4, "warehouse": "head"}},
        ],
    },
    "warehouses": {"stage": {"budget": 1}, "head": {"budget": 2}},
}


@pytest.fixture
def saved() -> SavedNetwork:
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE)
    network = build(recipe).eval()
    set_temperature(network, 0.2)
    return SavedNetwork(network, recipe, Preprocessing(size=12), ("a", "b", "c", "d"))


@torch.no_grad()
def test_openvino_takes_every_batch_and_size(saved: SavedNetwork, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert write_openvino(saved, tmp_path / "net.xml") == "batch and size"
    found = kw_lightning.load(tmp_path / "net.xml")
    assert found.classes == saved.classes
    for batch, side in ((1, 12), (2, 15), (7, 12)):
        x = torch.randn(batch, 3, side, side)
        assert torch.allclose(found(x), saved.network(x), atol=1e-4)
    with pytest.raises(RunError, match=r"OpenVINO's files end in \.xml"):
        write_openvino(saved, tmp_path / "net.onnx")
    (tmp_path / "bad.xml").write_text("<net")
    with pytest.raises(RunError, match=r"bad\.xml: not a file of OpenVINO, or a damaged one"):
        kw_lightning.load(tmp_path / "bad.xml")


@torch.no_grad()
@pytest.mark.parametrize("portable", [False, True])
def test_executorch_runs_one_image(saved: SavedNetwork, tmp_path: Path, portable: bool) -> None:
    runtime = pytest.importorskip("executorch.runtime")
    assert write_executorch(saved, tmp_path / "net.pte", portable=portable).endswith("[1, 3, 12, 12]")
    assert (b"XnnpackBackend" in (tmp_path / "net.pte").read_bytes()) is not portable
    method = runtime.Runtime.get().load_program(tmp_path / "net.pte").load_method("forward")
    x = torch.randn(1, 3, 12, 12)
    (found,) = method.execute([x])
    assert torch.allclose(found, saved.network(x), atol=1e-4)
    assert json.loads((tmp_path / "net.json").read_text())["classes"] == ["a", "b", "c", "d"]


def test_what_is_not_installed_is_named(saved: SavedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openvino", "executorch.exir"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RunError, match=r"pip install 'kw-lightning\[openvino\]'"):
        write_openvino(saved, tmp_path / "net.xml")
    with pytest.raises(RunError, match=r"pip install 'kw-lightning\[executorch\]'"):
        write_executorch(saved, tmp_path / "net.pte")
