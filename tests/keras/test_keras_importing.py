"""Importing models that Keras 3 itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras_models
import numpy as np
import pytest
import torch
from keras_installed import has_keras
from keras_weights import copy_weights
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.errors import RecipeError
from kw_lightning.keras import read_network
from kw_lightning.keras.importing import import_keras, recipe_text
from kw_lightning.keras.importing.reading import MAX_JSON_BYTES
from kw_lightning.recipe import load_recipe

FILES = sorted(keras_models.DATA.glob("*.json"))
needs_keras = pytest.mark.skipif(not has_keras(), reason="Keras is not installed")


def differences(text: str, arrays: dict[str, Any], folder: Path) -> float:
    """Return how far the imported network is from Keras's output, its weights copied."""
    file = folder / "imported.yaml"
    file.write_text(recipe_text(import_keras(text)))
    network = read_network(load_recipe(file))
    model = network.build().eval()
    weights = {key.removeprefix("weight/"): arrays[key] for key in arrays if key.startswith("weight/")}
    copy_weights(weights, network, model)
    x, expected = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    if tuple(x.shape[1:]) != network.input_shape:
        x = x.movedim(-1, 1)
    with torch.no_grad():
        y = model(x)
    if y.shape != expected.shape:
        y = y.movedim(1, -1)
    assert y.shape == expected.shape
    assert expected.std() > 1e-3
    return float((y - expected).abs().max())


def test_files_are_there() -> None:
    assert [file.stem for file in FILES] == sorted(make.__name__ for make in keras_models.MODELS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imported_network_computes_what_keras_did(file: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(file.with_suffix(".npz")))
    assert differences(file.read_text(), arrays, tmp_path) < 1e-5


@needs_keras
@pytest.mark.parametrize("make", keras_models.MODELS, ids=lambda make: make.__name__)
def test_live_keras(make: Any, tmp_path: Path) -> None:
    import keras

    keras.utils.clear_session()
    model = make()
    assert differences(model.to_json(), keras_models.evaluated(model, seed=11), tmp_path) < 1e-5


@needs_keras
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "Xception", "DenseNet121"])
def test_networks_of_keras_applications(name: str) -> None:
    import keras

    keras.utils.clear_session()
    model = getattr(keras.applications, name)(weights=None, input_shape=(75, 75, 3), include_top=False, pooling="avg")
    network = read_network(load_recipe(import_keras(model.to_json())))
    weights: dict[str, Any] = {}
    random = np.random.RandomState(0)
    for layer in model.layers:
        for variable in layer.weights:
            if "moving" in variable.path or "gamma" in variable.path or "beta" in variable.path:
                variable.assign(1 + 0.2 * random.rand(*variable.shape))
            path = variable.path.rpartition(f"{layer.name}/")[2]
            weights[f"{layer.name}/{path}"] = variable.value.detach().numpy()
    built = network.build().eval()
    copy_weights(weights, network, built)
    x = np.random.RandomState(0).standard_normal((1, 75, 75, 3)).astype(np.float32)
    expected = model(x, training=False).detach()
    with torch.no_grad():
        y = built(torch.from_numpy(x).movedim(-1, 1))
    assert expected.std() > 1e-2
    assert torch.allclose(y, expected, atol=1e-5)


def test_whatever_cannot_be_said_is_listed_at_once() -> None:
    data = json.loads((keras_models.DATA / "sequential_images.json").read_text())
    layers = data["config"]["layers"]
    layers[1]["class_name"] = "LocallyConnected2D"
    layers[4]["config"]["rotate"] = True
    layers[5]["class_name"] = "Flaten"
    layers.append({"class_name": "Sequential", "config": {"name": "inner", "layers": []}})
    with pytest.raises(RecipeError) as caught:
        import_keras(json.dumps(data), file="model.json")
    messages = [str(problem) for problem in caught.value.problems]
    assert any(
        '"conv2d": found the unknown layer "LocallyConnected2D", allowed: a layer of `kw schema`' in message
        for message in messages
    )
    assert any('found the unknown layer "Flaten"' in m and m.endswith('; did you mean "Flatten"?') for m in messages)
    assert any('"inner": found the model inside the model "Sequential", allowed: ' in message for message in messages)
    assert all(message.startswith("model.json:1:1") for message in messages)


def test_what_has_no_counterpart_is_refused() -> None:
    data = json.loads((keras_models.DATA / "tokens.json").read_text())
    attention = data["config"]["layers"][2]
    assert attention["class_name"] == "MultiHeadAttention"
    attention["config"]["use_gate"] = True
    attention["config"]["num_beams"] = 3
    attention["inbound_nodes"][0]["kwargs"]["use_causal_mask"] = True
    with pytest.raises(RecipeError, match="called with use_causal_mask"):
        import_keras(json.dumps(data))
    del attention["inbound_nodes"][0]["kwargs"]["use_causal_mask"]
    with pytest.raises(RecipeError) as caught:
        import_keras(json.dumps(data))
    assert "use_gate: True cannot be written" in str(caught.value)
    assert "found num_beams: 3, allowed: arguments that MultiHeadAttention has in a recipe" in str(caught.value)


def test_shared_layers_several_inputs_and_open_shapes_are_refused() -> None:
    data = json.loads((keras_models.DATA / "residual_images.json").read_text())
    layers = data["config"]["layers"]
    layers[2]["inbound_nodes"] *= 2
    layers[0]["config"]["batch_shape"] = [None, None, 15, 3]
    layers.append({**layers[0], "name": "second"})
    data["config"]["output_layers"] = [["dense", 0, 0], ["add", 0, 0]]
    with pytest.raises(RecipeError) as caught:
        import_keras(json.dumps(data))
    text = str(caught.value)
    assert "found 2 calls that share its weights, allowed: one" in text
    assert "found the shape [null, null, 15, 3], allowed: the known shape of one sample; keras.Input(shape" in text
    assert "model: found 2 inputs, allowed: one\n" in text
    assert "model: found 2 outputs, allowed: one\n" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested deeper"),
        ("[" * 80 + "]" * 80, "nested deeper"),
        ("[" + "0," * 900_000 + "0]", "more than"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": NaN}', "not JSON"),
        (" " * (MAX_JSON_BYTES + 1), "at most"),
        ("[]", "model: found an empty list, allowed: the JSON of a Sequential or Functional model of Keras 3$"),
        ('{"class_name": "Pipeline", "config": {}}', 'model: found "Pipeline", allowed: the JSON of'),
        (
            '{"class_name": "Sequential", "config": {"layers": [1]}}',
            "found a list of 1 value, allowed: a list of layers",
        ),
        ('{"class_name": "Sequential", "config": {"layers": []}}', "no layers"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_files_that_are_no_model(text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        import_keras(text)


def test_the_command_writes_a_recipe_and_leaves_a_file_that_is_there(tmp_path: Path) -> None:
    runner, file, written = CliRunner(), keras_models.DATA / "series.json", tmp_path / "series.yaml"
    result = runner.invoke(application(), ["import-keras", str(file), "-o", str(written), "--name", "my-series"])
    assert result.exit_code == 0, result.output
    recipe = load_recipe(written)
    assert recipe.name == "my-series"
    assert read_network(recipe).output_shape == (5,)
    again = runner.invoke(application(), ["import-keras", str(file), "-o", str(written)])
    assert again.exit_code == 1
    assert "already" in again.output
    printed = runner.invoke(application(), ["import-keras", str(file)])
    assert "- Conv1D: {name: conv1d, " in printed.output
    missing = runner.invoke(application(), ["import-keras", str(tmp_path / "none.json")])
    assert missing.exit_code == 1
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert runner.invoke(application(), ["import-keras", str(wrong)]).exit_code == 2
