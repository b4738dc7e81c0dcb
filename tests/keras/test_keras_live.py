"""Beside Keras itself, where it is installed: windows, padding, activations, start values."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from keras_installed import has_keras
from test_keras_vocabulary import layer_of, run

from kw_lightning.keras.initializers import INITIALIZERS
from kw_lightning.keras.layers.activation import ACTIVATIONS
from kw_lightning.keras.shapes import ShapeError, same_padding

os.environ.setdefault("KERAS_BACKEND", "torch")
if not has_keras():
    pytest.skip("Keras is not installed", allow_module_level=True)
keras = pytest.importorskip("keras")

SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))
WINDOWS = ["Conv2D", "DepthwiseConv2D", "MaxPooling2D", "AveragePooling2D"]


@pytest.mark.parametrize("kind", WINDOWS)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), window=SIDES, strides=SIDES,
       dilation=st.integers(1, 2), padding=st.sampled_from(["same", "valid"]))  # fmt: skip
@settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])
def test_windows_give_what_keras_gives(
    kind: str, size: Any, window: Any, strides: Any, dilation: int, padding: str
) -> None:
    if kind == "DepthwiseConv2D":  # Keras moves its window by equal steps only
        strides = (strides[0], strides[0])
    arguments: dict[str, Any] = {"strides": list(strides), "padding": padding}
    if kind.endswith("Pooling2D"):
        arguments["pool_size"] = list(window)
    else:
        arguments["kernel_size"] = list(window)
        if max(strides) == 1:  # Keras has strides or a dilation, and the dilation of a depthwise one alike in both
            arguments["dilation_rate"] = dilation
    if kind == "Conv2D":
        arguments["filters"] = 3
    if kind == "AveragePooling2D" and padding == "same":
        # Keras's torch backend repeats the edge where it pads unevenly; its TensorFlow and JAX backends leave the
        # padding out of the mean, as here.
        pads = [same_padding(*sides) for sides in zip(size, window, strides, strict=True)]
        assume(all(before == after for before, after in pads))
    layer = layer_of(kind, **arguments)
    try:
        expected_shape = layer.output_shape((2, *size))
    except ShapeError:
        assume(False)
    theirs = getattr(keras.layers, kind)(**arguments)
    x = np.random.RandomState(0).standard_normal((1, *size, 2)).astype(np.float32)
    expected = theirs(x).detach().movedim(-1, 1)
    parts = layer.build((2, *size))
    if theirs.weights:
        kernel = torch.from_numpy(theirs.kernel.value.detach().numpy())
        order = (2, 3, 0, 1) if kind == "DepthwiseConv2D" else (3, 2, 0, 1)
        parts.main.load_state_dict(
            {"weight": kernel.permute(order).reshape(parts.main.weight.shape), "bias": parts.main.bias}
        )
    assert tuple(expected.shape[1:]) == expected_shape
    assert torch.allclose(run(parts, torch.from_numpy(x).movedim(-1, 1)), expected, atol=1e-5)


def test_attention_to_others_with_a_key_of_its_own() -> None:
    random = np.random.RandomState(0)
    query, value, key = (random.standard_normal((2, *shape)).astype(np.float32) for shape in ((3, 4), (5, 6), (5, 7)))
    theirs = keras.layers.MultiHeadAttention(2, 3, value_dim=5)
    expected = theirs(query, value, key=key).detach()
    arguments = {"num_heads": 2, "key_dim": 3, "value_dim": 5}
    layer = layer_of("MultiHeadAttention", **arguments)
    module = layer.build((3, 4), (5, 6), (5, 7)).main
    weights = {variable.path.split("/", 1)[1]: variable.value.detach() for variable in theirs.weights}
    state = {}
    for projection in ("query", "key", "value"):
        state[f"{projection}.weight"] = weights[f"{projection}/kernel"].flatten(1).T
        state[f"{projection}.bias"] = weights[f"{projection}/bias"].flatten()
    state["output.weight"] = weights["attention_output/kernel"].flatten(0, 1).T
    state["output.bias"] = weights["attention_output/bias"]
    module.load_state_dict(state)
    assert layer.output_shape((3, 4), (5, 6), (5, 7)) == (3, 4)
    assert torch.allclose(module(*map(torch.from_numpy, (query, value, key))), expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_give_what_keras_gives(name: str) -> None:
    x = torch.linspace(-8, 8, 96).reshape(4, 24)
    expected = keras.activations.get(name)(x).detach()
    assert torch.allclose(ACTIVATIONS[name]((24,))(x), expected, atol=1e-5)


@pytest.mark.parametrize("max_value", [None, 6, 1.5])
@pytest.mark.parametrize("negative_slope", [0.0, 0.2])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_relu_gives_what_keras_gives(max_value: float | None, negative_slope: float, threshold: float) -> None:
    arguments = {"max_value": max_value, "negative_slope": negative_slope, "threshold": threshold}
    x = torch.linspace(-8, 8, 97)[None]
    expected = keras.layers.ReLU(**arguments)(x)
    assert torch.allclose(run(layer_of("ReLU", **arguments).build((97,)), x), expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "DepthwiseConv2D"])
def test_start_values_are_spread_as_in_keras(kind: str, name: str) -> None:
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"units": 300} if kind == "Dense" else {"kernel_size": 3}
    arguments |= {"filters": 96} if kind == "Conv2D" else {"depth_multiplier": 8} if kind == "DepthwiseConv2D" else {}
    arguments["depthwise_initializer" if kind == "DepthwiseConv2D" else "kernel_initializer"] = name
    theirs = getattr(keras.layers, kind)(**arguments)
    theirs.build((None, 200) if kind == "Dense" else (None, 8, 8, 128))
    kernel = theirs.kernel.value.detach()
    ours = layer_of(kind, **arguments).build((200,) if kind == "Dense" else (128, 8, 8)).main
    assert ours.weight.numel() == kernel.numel() > 9000
    assert float(ours.weight.detach().std()) == pytest.approx(float(kernel.std()), rel=0.05, abs=1e-9)
    assert float(ours.weight.detach().abs().max()) == pytest.approx(float(kernel.abs().max()), rel=0.3, abs=1e-9)
    assert float(ours.weight.detach().mean()) == pytest.approx(float(kernel.mean()), abs=0.01)
    assert not ours.bias.detach().any()


def test_norms_in_training() -> None:
    x = np.random.RandomState(0).standard_normal((64, 5, 5, 4)).astype(np.float32) * 3 + 1
    theirs = keras.layers.BatchNormalization()
    expected = torch.as_tensor(theirs(x, training=True)).detach().movedim(-1, 1)
    ours = layer_of("BatchNormalization").build((4, 5, 5)).main.train()
    assert (ours.momentum, ours.eps) == (0.01, 1e-3)
    assert torch.allclose(ours(torch.from_numpy(x).movedim(-1, 1)), expected, atol=1e-4)
    assert torch.allclose(ours.running_mean, theirs.moving_mean.value.detach(), atol=1e-5)
    # Keras takes in the biased variance of a batch, PyTorch the unbiased one.
    assert torch.allclose(ours.running_var, theirs.moving_variance.value.detach(), rtol=1e-3)
