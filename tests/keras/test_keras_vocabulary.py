"""Each layer: arguments and defaults as Keras has them, and the inferred shape equal to that of a real forward pass."""

from __future__ import annotations

import inspect
import os
from dataclasses import MISSING
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from keras_installed import has_keras
from torch.nn import functional as F

from kw_lightning.keras import LAYERS
from kw_lightning.keras.importing.conversion import OURS
from kw_lightning.keras.layer import Layer, Parts, read_layer
from kw_lightning.keras.layers.activation import ACTIVATIONS
from kw_lightning.keras.shapes import ShapeError, broadcast, same_padding

SIDES = ("1D", "2D", "3D")
ASKED = {
    *(f"{kind}{sides}" for kind in ("Conv", "MaxPooling", "AveragePooling") for sides in SIDES),
    *(f"Global{kind}Pooling{sides}" for kind in ("Average", "Max") for sides in SIDES),
    *("DepthwiseConv2D", "SeparableConv2D", "Dense", "MultiHeadAttention", "Embedding"),
    *("BatchNormalization", "LayerNormalization", "GroupNormalization"),
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "GELU", "SiLU", "Softmax"),
    *("ZeroPadding2D", "UpSampling2D", "Flatten", "Reshape", "Permute"),
    *("Dropout", "SpatialDropout2D", "StochasticDepth"),
    *("Add", "Subtract", "Multiply", "Concatenate", "Average", "Maximum"),
}
# Arguments that Keras's layers do not have.
ADDED = {"warehouse", "depthwise_warehouse"}
# Keras's name for an axis of channels-last data is -1; here None means channels or features.
AXIS = "axis"


def layer_of(kind: str, **arguments: Any) -> Layer:
    """Return a layer with its arguments read as from a recipe."""
    problems: list[tuple[str, str]] = []
    layer = read_layer(LAYERS[kind], arguments, lambda *problem: problems.append(problem))
    assert not problems
    assert layer is not None
    return layer


def run(parts: Parts, *inputs: torch.Tensor) -> torch.Tensor:
    """Run the parts of a layer in eval mode."""
    x: Any = inputs
    for _, module in parts.named("layer"):
        x = (module.eval()(*x),)
    return x[0]  # type: ignore[no-any-return]


def test_vocabulary_is_complete() -> None:
    assert set(LAYERS) >= ASKED
    assert set(LAYERS) - ASKED == {"LayerScale", "ClassToken", "SelectToken", "PositionEmbedding"}


@pytest.mark.skipif(not has_keras(), reason="Keras is not installed")
@pytest.mark.parametrize("kind", sorted(set(LAYERS) - OURS))
def test_arguments_and_defaults_are_those_of_keras(kind: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    theirs = inspect.signature(getattr(keras.layers, kind).__init__).parameters
    ours = LAYERS[kind].arguments()
    for name, field in ours.items():
        if name in ADDED or (name == AXIS and field.default is None):
            continue
        assert name in theirs, f"{kind} of Keras has no {name}"
        theirs_default = theirs[name].default
        if theirs_default is inspect.Parameter.empty:
            assert field.default is MISSING, name
            continue
        dimensions = LAYERS[kind].dimensions
        read = field.metadata["argument"].read
        theirs_default = list(theirs_default) if isinstance(theirs_default, tuple) else theirs_default
        assert read(field.default, dimensions) == read(theirs_default, dimensions), name
    required = {name for name, p in theirs.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
    assert required - {"self"} == {name for name, field in ours.items() if field.default is MISSING}


SIZES = st.integers(1, 12)
WINDOW = {
    "kernel_size": st.integers(1, 4),
    "strides": st.integers(1, 3),
    "padding": st.sampled_from(["same", "valid", 1, 2]),
    "dilation_rate": st.integers(1, 2),
}
POOL = {"pool_size": st.integers(1, 4), "strides": st.integers(1, 3), "padding": st.sampled_from(["same", "valid"])}
ACTIVATION = st.sampled_from([None, *sorted(ACTIVATIONS)])
NORM = {"epsilon": st.just(1e-3), "center": st.booleans(), "scale": st.booleans()}
CHOICES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    **{f"Conv{d}D": {"filters": st.sampled_from([2, 4]), "activation": ACTIVATION, "use_bias": st.booleans(), **WINDOW}
       for d in (1, 2, 3)},
    "DepthwiseConv2D": {"depth_multiplier": st.integers(1, 3), **WINDOW},
    "SeparableConv2D": {"filters": st.integers(1, 4), "depth_multiplier": st.integers(1, 2), **WINDOW},
    "Dense": {"units": st.integers(1, 5), "activation": ACTIVATION},
    "BatchNormalization": NORM,
    "LayerNormalization": {**NORM, "axis": st.sampled_from([None, 1, -1])},
    "GroupNormalization": {**NORM, "groups": st.sampled_from([-1, 1, 2])},
    "Activation": {"activation": st.sampled_from(sorted(ACTIVATIONS))},
    "ReLU": {"max_value": st.sampled_from([None, 6, 1.5]), "negative_slope": st.sampled_from([0, 0.1]),
             "threshold": st.sampled_from([0, 0.5])},
    "PReLU": {"shared_axes": st.sampled_from([None, [1]])},
    **{f"{kind}Pooling{d}D": POOL for kind in ("Max", "Average") for d in (1, 2, 3)},
    **{f"Global{kind}Pooling{d}D": {"keepdims": st.booleans()} for kind in ("Max", "Average") for d in (1, 2, 3)},
    "ZeroPadding2D": {"padding": st.sampled_from([0, 1, [1, 2], [[0, 1], [2, 0]]])},
    "UpSampling2D": {"size": st.sampled_from([1, 2, [1, 3]]),
                     "interpolation": st.sampled_from(["nearest", "bilinear"])},
    "Reshape": {"target_shape": st.sampled_from([[-1], [2, -1], [-1, 2, 1]])},
    "Permute": {"dims": st.sampled_from([[1], [2, 1], [3, 1, 2], [2, 3, 1]])},
    **{kind: {"rate": st.just(0.5)} for kind in ("Dropout", "SpatialDropout2D", "StochasticDepth")},
    **{kind: {} for kind in ("LeakyReLU", "GELU", "SiLU", "Softmax", "Flatten", "LayerScale", "PositionEmbedding",
                             "ClassToken", "SelectToken")},
    "MultiHeadAttention": {"num_heads": st.integers(1, 3), "key_dim": st.integers(1, 4),
                           "value_dim": st.sampled_from([None, 3])},
    "Embedding": {"input_dim": st.just(9), "output_dim": st.integers(1, 4)},
    **{kind: {} for kind in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Concatenate")},
}  # fmt: skip


ON_TOKENS = {"MultiHeadAttention", "PositionEmbedding", "ClassToken", "SelectToken"}


def test_every_layer_is_tried() -> None:
    assert set(CHOICES) == set(LAYERS)


@pytest.mark.parametrize("kind", sorted(CHOICES))
@given(data=st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.filter_too_much])
def test_inferred_shape_is_the_real_one(kind: str, data: st.DataObject) -> None:
    arguments = data.draw(st.fixed_dictionaries(CHOICES[kind]))
    layer = layer_of(kind, **arguments)
    sides = layer.dimensions or (1 if kind in ON_TOKENS else data.draw(st.integers(0, 3)))
    channels = data.draw(st.sampled_from([1, 2, 4]))
    shape = (channels, *data.draw(st.lists(SIZES, min_size=sides, max_size=sides)))
    inputs = (shape,) * max(layer.least_inputs, 1)
    try:
        expected = layer.output_shape(*inputs)
    except ShapeError:
        assume(False)
    tensors = [torch.rand(2, *shape) for _ in inputs]
    assert tuple(run(layer.build(*inputs), *tensors).shape) == (2, *expected)


CHAIN = st.sampled_from([kind for kind in CHOICES if LAYERS[kind].least_inputs == 1])


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4))
@settings(max_examples=60)
def test_chains_of_layers(data: st.DataObject, shape: list[int]) -> None:
    current, x = tuple(shape), torch.rand(2, *shape)
    for _ in range(6):
        kind = data.draw(CHAIN)
        layer = layer_of(kind, **data.draw(st.fixed_dictionaries(CHOICES[kind])))
        try:
            after = layer.output_shape(current)
        except ShapeError:
            continue
        if len(after) > 5 or torch.Size(after).numel() > 20_000:
            continue
        x = x.abs() % 8 if kind == "Embedding" else x
        x, current = run(layer.build(current), x), after
        assert tuple(x.shape[1:]) == current


@given(size=st.integers(1, 40), kernel=st.integers(1, 9), stride=st.integers(1, 6), dilation=st.integers(1, 3))
def test_same_padding_gives_the_size_that_tensorflow_gives(size: int, kernel: int, stride: int, dilation: int) -> None:
    before, after = same_padding(size, kernel, stride, dilation)
    reach = dilation * (kernel - 1) + 1
    padded = size + before + after
    assert 0 <= after - before <= 1
    assert (padded - reach) // stride + 1 == -(-size // stride) if before + after else padded == size


def test_same_padding_is_behind_where_it_is_odd() -> None:
    x = torch.randn(1, 2, 6, 7)
    parts = layer_of("Conv2D", filters=3, kernel_size=3, strides=2, padding="same").build((2, 6, 7))
    y = F.conv2d(F.pad(x, (1, 1, 0, 1)), parts.main.weight, parts.main.bias, stride=2)
    assert torch.equal(run(parts, x), y)


def test_average_pooling_leaves_the_padding_out() -> None:
    layer = layer_of("AveragePooling2D", pool_size=2, strides=2, padding="same")
    y = run(layer.build((1, 3, 3)), torch.ones(1, 1, 3, 3))
    assert torch.equal(y, torch.ones(1, 1, 2, 2))


def test_max_pooling_pads_with_nothing() -> None:
    for padding in ("same", 1):
        layer = layer_of("MaxPooling2D", pool_size=2, strides=2, padding=padding)
        assert run(layer.build((1, 3, 3)), -torch.ones(1, 1, 3, 3)).max() == -1


def test_stochastic_depth_drops_whole_samples() -> None:
    torch.manual_seed(0)
    module = layer_of("StochasticDepth", rate=0.5).build((4, 3, 3)).main.train()
    y = module(torch.ones(200, 4, 3, 3)).flatten(1)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert ((y == y[:, :1]).all(1)).all()


def test_shapes_are_broadcast_as_in_keras_or_refused() -> None:
    assert broadcast([(4, 1, 1), (4, 5, 6)]) == (4, 5, 6)
    for shapes in ([(4, 5), (4, 6)], [(4,), (4, 1)]):
        with pytest.raises(ShapeError, match="different shapes"):
            broadcast(shapes)


def test_attention_takes_query_value_and_key() -> None:
    layer = layer_of("MultiHeadAttention", num_heads=2, key_dim=3)
    shapes = ((3, 4), (5, 6), (5, 7))
    module = layer.build(*shapes).main
    assert (module.query.in_features, module.value.in_features, module.key.in_features) == (4, 6, 7)
    assert run(layer.build(*shapes), *[torch.randn(2, *shape) for shape in shapes]).shape == (2, 3, 4)
    with pytest.raises(ShapeError, match=r"found value \[5, 6\] and key \[4, 7\], allowed: as many tokens in both"):
        layer.output_shape((3, 4), (5, 6), (4, 7))


def test_layer_norm_is_over_channels_of_images_and_features_of_tokens() -> None:
    image, tokens = torch.randn(2, 5, 4, 3) * 3 + 1, torch.randn(2, 5, 4) * 3 + 1
    assert run(layer_of("LayerNormalization").build((5, 4, 3)), image).mean(1).abs().max() < 1e-5
    assert run(layer_of("LayerNormalization").build((5, 4)), tokens).mean(2).abs().max() < 1e-5
