"""Copying the weights of a Keras model into the network that a recipe made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from kw_lightning.keras import Network

Weights = Mapping[str, np.ndarray[Any, Any]]


def copy_weights(weights: Weights, network: Network, model: nn.Module) -> None:
    """Copy Keras's weights, by layer and variable, and see that each of the model's own was given.

    Args:
        weights: `conv2d/kernel` → Keras's array.
        network: the imported network; its module names are the layers' names in Keras.
        model: what it built.
    """
    given: set[str] = set()
    state = model.state_dict()
    kinds = {row.name: row.type for row in network.summary()}
    for path, value in weights.items():
        layer, _, variable = path.partition("/")
        layer = layer.replace("-", "_")
        name, array = _place(kinds[layer], layer, variable, value)
        key = f"{layer}.{name}"
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if kinds[layer] == "PReLU" and tensor.shape != state[key].shape:
            tensor = tensor.movedim(-1, 0)
        assert tensor.shape == state[key].shape, (key, tensor.shape, state[key].shape)
        state[key] = tensor
        given.add(key)
    missing = {key for key in state if key not in given and not key.endswith("num_batches_tracked")}
    assert not missing
    model.load_state_dict(state)


NAMES = {
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "alpha": "alpha",
    "embeddings": "weight",
}


def _place(kind: str, layer: str, variable: str, value: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    if kind == "MultiHeadAttention":
        projection, _, variable = variable.partition("/")
        name = {"attention_output": "output"}.get(projection, projection)
        if variable == "bias":
            return f"{name}.bias", value.reshape(-1)
        rows = value.shape[0] * value.shape[1] if name == "output" else value.shape[0]
        return f"{name}.weight", value.reshape(rows, -1).T
    if kind == "SeparableConv2D":
        if variable == "depthwise_kernel":
            return "depthwise.weight", _depthwise(value)
        return (
            ("pointwise.weight", value.transpose(3, 2, 0, 1))
            if variable == "pointwise_kernel"
            else (
                "pointwise.bias",
                value,
            )
        )
    if variable == "kernel" and kind == "DepthwiseConv2D":
        return "weight", _depthwise(value)
    if variable == "kernel":
        sides = value.ndim - 2
        return "weight", value.transpose(sides + 1, sides, *range(sides))
    return NAMES[variable], value


def _depthwise(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[height, width, channels, multiplier] → [channels · multiplier, 1, height, width]."""
    height, width, channels, multiplier = value.shape
    return value.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
