"""Networks of every family as ONNX, in onnxruntime against PyTorch: small ones always, the zoo with `-m slow`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from kw_lightning.builder import build
from kw_lightning.export import write_onnx
from kw_lightning.inference import SavedNetwork
from kw_lightning.keras.importing import import_keras
from kw_lightning.nn import KWLayer, set_temperature
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

KERAS = Path(__file__).parents[1] / "data" / "keras"
DYNAMIC = ("Conv", "Dense", "Depthwise", "Separable", "MultiHead")
BATCHES = (1, 2, 7)
WORDS = 20  # that the network of tokens knows
Sizes = Sequence[tuple[int, ...]]

SMALL: dict[int, Sizes] = {1: [(9,), (12,)], 3: [(6, 7, 8), (8, 8, 9)]}
"""Dimensions → sizes."""
OTHERS: dict[str, Sizes] = {
    "series": [(20,)],
    "volumes": [(6, 7, 8), (8, 8, 9)],
    "channels_first_images": [(10, 9)],
    "residual_images": [(16, 15), (21, 18)],
    "separable_images": [(12, 9)],
    "sequential_images": [(11, 14)],
    "tokens": [()],
}
"""Keras's models → sizes; where there is one, a layer fixes it."""
TEN = {"num_classes": 10}
ZOO: dict[str, tuple[dict[str, Any], Sizes]] = {
    **{
        name: ({"args": TEN}, [(64, 64), (96, 70)])
        for name in (
            "resnet18-kw-1x",
            "resnet18-kw-1d4x",
            "resnet50-kw-1d2x",
            "mobilenetv2-050-kw-1x",
            "mobilenetv2-050-kw-1d2x",
            "convnext-tiny-kw-1x",
            "efficientnet-b0-kw-1x",
            "regnety-400mf-kw-1x",
            "swin-tiny-kw-1x",
        )
    },
    "deit-tiny-kw-1x": ({"args": {**TEN, "img_size": 64}}, [(64, 64)]),
    **{f"keras-{name}-kw-1x": ({}, [(64, 64), (96, 70)]) for name in ("resnet18", "mobilenetv2", "convnext-tiny")},
    "keras-deit-tiny-kw-4x": ({}, [(64, 64)]),
}
"""Shipped recipes → what is made smaller of them, and sizes."""


def keras_recipe(name: str) -> dict[str, Any]:
    """Return the recipe of a Keras model with every layer dynamic that can be, those of a kind in one warehouse."""
    recipe = import_keras((KERAS / f"{name}.json").read_text())
    for layer in recipe["model"]["layers"]:
        for kind, arguments in layer.items():
            if kind.startswith(DYNAMIC):
                arguments["warehouse"] = kind
    kinds = {kind for layer in recipe["model"]["layers"] for kind in layer if kind.startswith(DYNAMIC)}
    return {**recipe, "warehouses": {kind: {"budget": 2, "attention": {"norm": "layer"}} for kind in sorted(kinds)}}


def made(recipe: dict[str, Any]) -> SavedNetwork:
    """Return a network in the middle of its annealing, its norms with statistics as after a training."""
    torch.manual_seed(0)
    loaded = load_recipe(recipe)
    network = build(loaded).eval()
    set_temperature(network, 0.3)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    assert any(isinstance(module, KWLayer) for module in network.modules())
    return SavedNetwork(network, loaded, Preprocessing(), ("a",))


def sample(saved: SavedNetwork, batch: int, size: tuple[int, ...]) -> Tensor:
    assert saved.recipe.model is not None
    shape = saved.recipe.model.input or ()
    return torch.randn(batch, shape[0], *size) if size else torch.randint(0, WORDS, (batch, *shape)).float()


@torch.no_grad()
def check(recipe: dict[str, Any], sizes: Sizes, path: Path) -> None:
    """Export a network, and compare it with PyTorch's at every batch and size."""
    saved = made(recipe)
    free = write_onnx(saved, path)
    graph = onnx.load(str(path)).graph
    assert {node.domain for node in graph.node} == {""}
    fixed = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in fixed for node in graph.node if node.op_type == "Conv")  # no kernel a sample
    session = runtime.InferenceSession(str(path))
    assert free == "batch and size" or len(sizes) == 1
    for size in sizes:
        for batch in BATCHES:
            x = sample(saved, batch, size)
            expected = saved.network(x).numpy()
            (found,) = session.run(None, {"images": x.numpy()})
            assert np.abs(found - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("dimensions", SMALL)
def test_small_networks_of_one_and_three_dimensions(dimensions: int, tmp_path: Path) -> None:
    layers = [
        {f"Conv{dimensions}D": {"filters": 4, "kernel_size": 2, "strides": 2, "warehouse": "all"}},
        {f"GlobalAveragePooling{dimensions}D": {}},
        {"Dense": {"units": 3}},
    ]
    model = {"input": [2, *SMALL[dimensions][0]], "layers": layers}
    recipe = {"kw": 1, "name": "small", "model": model, "warehouses": {"all": {"budget": 1}}}
    check(recipe, SMALL[dimensions], tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", OTHERS)
def test_networks_from_keras(name: str, tmp_path: Path) -> None:
    check(keras_recipe(name), OTHERS[name], tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_the_zoo(name: str, tmp_path: Path) -> None:
    if name.startswith("deit"):
        pytest.importorskip("timm")
    changed, sizes = ZOO[name]
    check(
        {"kw": 1, "name": "s", "extends": name, "model": {"input": [3, 64, 64], **changed}}, sizes, tmp_path / "n.onnx"
    )
