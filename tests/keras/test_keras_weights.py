"""Keras's own files of weights, read without Keras: the networks compute what Keras computed."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import keras_models
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kw_lightning.builder import build
from kw_lightning.cli import application
from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe

h5py = pytest.importorskip("h5py")
DATA = keras_models.DATA
NAMES = sorted(path.stem for path in DATA.glob("*.json"))


def imported(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(application(), ["import-keras", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def difference(recipe: Path, arrays: Any) -> float:
    """Return how far the network of a recipe is from Keras's output."""
    loaded = load_recipe(recipe)
    assert loaded.model is not None
    x, expected = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    if tuple(x.shape[1:]) != loaded.model.input:
        x = x.movedim(-1, 1)
    with torch.no_grad():
        y = build(loaded).eval()(x)
    y = y if y.shape == expected.shape else y.movedim(1, -1)
    return float((y - expected).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_network_starts_from_the_weights_that_keras_wrote(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "net.yaml"
    said = imported(DATA / f"{name}.json", "--weights", DATA / f"{name}.weights.h5", "-o", recipe)
    assert f"and its weights {tmp_path / 'net.safetensors'}" in said
    assert difference(recipe, np.load(DATA / f"{name}.npz")) < 1e-5


def test_a_keras_file_holds_both(tmp_path: Path) -> None:
    imported(DATA / "series.keras", "-o", tmp_path / "series.yaml")
    assert difference(tmp_path / "series.yaml", np.load(DATA / "series.npz")) < 1e-5
    assert "pretrained" not in imported(DATA / "series.keras")  # printed: there is no place for the weights


def test_layers_with_a_warehouse_start_warm(tmp_path: Path) -> None:
    recipe = tmp_path / "net.yaml"
    imported(DATA / "volumes.json", "--weights", DATA / "volumes.weights.h5", "-o", recipe)
    text = recipe.read_text().replace("name: conv3d,", "name: conv3d, warehouse: all,")
    recipe.write_text(text + "warehouses:\n  all: {budget: 1}\n")
    assert difference(recipe, np.load(DATA / "volumes.npz")) < 1e-5


def test_the_last_layer_alone_may_have_another_size(tmp_path: Path) -> None:
    recipe = tmp_path / "net.yaml"
    imported(DATA / "residual_images.json", "--weights", DATA / "residual_images.weights.h5", "-o", recipe)
    text = recipe.read_text()
    recipe.write_text(text.replace("units: 7", "units: 5"))
    assert build(load_recipe(recipe)).dense.weight.shape[0] == 5
    recipe.write_text(text.replace("name: conv2d_2, filters: 12", "name: conv2d_2, filters: 1"))
    with pytest.raises(RecipeError, match=r"conv2d_2\.weight: \[12, 12, 1, 1\] instead of \[1, 12, 1, 1\]"):
        build(load_recipe(recipe))
    recipe.write_text(text.replace("net.safetensors", "true"))
    with pytest.raises(RecipeError, match="found true, allowed: a file of weights, for a network of layers"):
        build(load_recipe(recipe))


def test_axes_that_are_equally_long_are_told_apart(tmp_path: Path) -> None:
    alpha = np.random.RandomState(0).standard_normal((4, 4, 4)).astype(np.float32)
    model = {
        "class_name": "Sequential",
        "config": {
            "name": "cube",
            "layers": [
                {"class_name": "InputLayer", "config": {"batch_shape": [None, 4, 4, 4], "name": "x"}},
                {"class_name": "PReLU", "config": {"name": "slopes"}},
            ],
        },
    }
    (tmp_path / "cube.json").write_text(json.dumps(model))
    with h5py.File(tmp_path / "cube.weights.h5", "w") as file:
        file["layers/p_re_lu/vars/0"] = alpha
    imported(tmp_path / "cube.json", "--weights", tmp_path / "cube.weights.h5", "-o", tmp_path / "cube.yaml")
    network = build(load_recipe(tmp_path / "cube.yaml"))
    with torch.no_grad():
        assert torch.equal(network(torch.full((1, 4, 4, 4), -1.0))[0], -torch.from_numpy(alpha).movedim(-1, 0))


def test_weights_of_another_model_are_one_message(tmp_path: Path) -> None:
    recipe = tmp_path / "net.yaml"
    said = imported(DATA / "series.json", "--weights", DATA / "volumes.weights.h5", "-o", recipe, code=1)
    assert "volumes.weights.h5 does not fit the model: conv1d: layers/conv1d/vars/0 is missing; " in said
    assert "batch_normalization: layers/batch_normalization/vars/0 is [4], and the model has 6 numbers there" in said
    assert not list(tmp_path.iterdir())
    assert "give --output FILE" in imported(
        DATA / "series.json", "--weights", DATA / "series.weights.h5", code=1
    ).replace("\n", " ")


def test_odd_files_are_one_message_each(tmp_path: Path) -> None:
    cut, other, linked, bomb = (tmp_path / name for name in ("cut.h5", "other.h5", "linked.h5", "bomb.keras"))
    cut.write_bytes((DATA / "series.weights.h5").read_bytes()[:5000])
    with h5py.File(other, "w") as file:
        file["model_weights"] = np.zeros(3)
    shutil.copy(DATA / "series.weights.h5", linked)
    with h5py.File(linked, "a") as file:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = h5py.ExternalLink(str(DATA / "series.weights.h5"), "layers/dense/vars/0")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(DATA / "series.json", "config.json")
        archive.writestr("model.weights.h5", bytes(10_000_000))
    for file, message in (
        (cut, "cannot be read as Keras's weights"),
        (other, "holds no weights of a Sequential or Functional model"),
        (linked, "dense: layers/dense/vars/0 is missing"),
        (tmp_path / "none.h5", "cannot be read as Keras's weights"),
        (bomb, "model.weights.h5 has 10,000,000 bytes, more than are read"),
    ):
        said = imported(DATA / "series.json", "--weights", file, "-o", tmp_path / "net.yaml", code=1)
        assert message in said.replace("\n", " "), said
        assert not (tmp_path / "net.yaml").exists()
    assert "not a file of Keras" in imported(cut.rename(tmp_path / "cut.keras"), code=1).replace("\n", " ")
