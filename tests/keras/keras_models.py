"""Models that Keras itself writes as JSON and as files of weights, with inputs and outputs.

`python tests/keras/keras_models.py` writes them to tests/data/keras, so that the tests run without Keras:

    pip install keras && KERAS_BACKEND=torch python tests/keras/keras_models.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")

DATA = Path(__file__).parents[1] / "data" / "keras"


def sequential_images() -> Any:
    """A chain with "same" padding on even and odd sizes, and Flatten before Dense."""
    import keras
    from keras import layers as L

    return keras.Sequential(
        [
            keras.Input((11, 14, 3)),
            L.Conv2D(6, 3, padding="same", activation="relu"),
            L.BatchNormalization(),
            L.Conv2D(8, (3, 2), strides=2, padding="same", use_bias=False),
            L.BatchNormalization(scale=False, momentum=0.9),
            L.LeakyReLU(),
            L.MaxPooling2D(3, strides=2, padding="same"),
            L.Dropout(0.2),
            L.Flatten(),
            L.Dense(10, activation="softmax", kernel_regularizer="l2"),
        ],
        name="sequential_images",
    )


def residual_images() -> Any:
    """Residual blocks with strides, squeeze and excitation, and names that are no words."""
    import keras
    from keras import layers as L

    x = inputs = keras.Input((16, 15, 3), name="image")
    x = L.ZeroPadding2D(((1, 2), (0, 1)), name="stem.pad")(x)
    x = L.Conv2D(8, 5, strides=2, activation="gelu", kernel_initializer="he_normal", name="stem-conv")(x)
    shortcut = L.Conv2D(12, 1, strides=2, padding="same")(x)
    x = L.Conv2D(12, 3, strides=2, padding="same", groups=2)(x)
    x = L.GroupNormalization(4)(x)
    x = L.Activation("silu")(x)
    weights = L.GlobalAveragePooling2D(keepdims=True)(x)
    weights = L.Conv2D(12, 1, activation="sigmoid")(weights)
    x = L.Multiply()([x, weights])
    x = L.SpatialDropout2D(0.1)(x)
    x = L.Add()([x, shortcut])
    x = L.LayerNormalization()(x)
    x = L.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, L.Dense(7)(x), name="residual_images")


def separable_images() -> Any:
    """Depthwise and separable convolutions, every pooling, merges, and a dense layer on the channels of an image."""
    import keras
    from keras import layers as L

    x = inputs = keras.Input((12, 9, 4))
    x = L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x)
    x = L.ReLU(max_value=6)(x)
    a = L.SeparableConv2D(8, 3, padding="same", depth_multiplier=2, activation="elu")(x)
    b = L.AveragePooling2D(2, strides=1, padding="same")(x)
    c = L.MaxPooling2D(2, strides=1, padding="same")(x)
    x = L.Concatenate()([L.Maximum()([a, b]), L.Average()([a, b, c]), L.Subtract()([a, c])])
    x = L.PReLU(shared_axes=[1, 2])(x)
    x = L.PReLU()(x)
    x = L.UpSampling2D(2)(x)
    x = L.UpSampling2D((1, 2), interpolation="bilinear")(x)
    x = L.Dense(6, activation="tanh")(x)
    x = L.Conv2D(5, 3, dilation_rate=2, activation="softmax")(x)
    return keras.Model(inputs, x, name="separable_images")


def tokens() -> Any:
    """Numbers of words, attention to itself and to others, dense layers on tokens."""
    import keras
    from keras import layers as L

    inputs = keras.Input((7,))
    x = L.Embedding(20, 12)(inputs)
    attended = L.MultiHeadAttention(3, 4, value_dim=5)(x, x)
    x = L.LayerNormalization(epsilon=1e-6)(L.Add()([x, attended]))
    y = L.Dense(24, activation="gelu")(x)
    y = L.Dense(12)(y)
    y = L.MultiHeadAttention(2, 3, use_bias=False)(query=y, value=x, key=y)
    x = L.GlobalAveragePooling1D()(L.Add()([x, y]))
    return keras.Model(inputs, L.Dense(3, activation="log_softmax")(x), name="tokens")


def series() -> Any:
    """One dimension: causal convolution, pooling, reshaping and permuting."""
    import keras
    from keras import layers as L

    return keras.Sequential(
        [
            keras.Input((20, 3)),
            L.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="relu"),
            L.BatchNormalization(),
            L.MaxPooling1D(2),
            L.Conv1D(8, 4, strides=3, padding="same"),
            L.AveragePooling1D(2, strides=1, padding="same"),
            L.Softmax(),
            L.Reshape((2, -1)),
            L.Permute((2, 1)),
            L.Dense(4),
            L.Flatten(),
            L.Dense(5),
        ],
        name="series",
    )


def volumes() -> Any:
    """Three dimensions."""
    import keras
    from keras import layers as L

    return keras.Sequential(
        [
            keras.Input((6, 7, 8, 2)),
            L.Conv3D(4, 3, strides=2, padding="same", activation="relu"),
            L.BatchNormalization(),
            L.AveragePooling3D(2, padding="same"),
            L.MaxPooling3D((1, 2, 2)),
            L.GlobalAveragePooling3D(),
            L.Dense(3),
        ],
        name="volumes",
    )


def channels_first_images() -> Any:
    """Channels first in Keras too."""
    import keras
    from keras import layers as L

    return keras.Sequential(
        [
            keras.Input((3, 10, 9)),
            L.Conv2D(6, 3, strides=2, padding="same", data_format="channels_first"),
            L.BatchNormalization(axis=1),
            L.ReLU(),
            L.MaxPooling2D(2, data_format="channels_first"),
            L.Flatten(data_format="channels_first"),
            L.Dense(4),
        ],
        name="channels_first_images",
    )


MODELS: tuple[Callable[[], Any], ...] = (
    sequential_images,
    residual_images,
    separable_images,
    tokens,
    series,
    volumes,
    channels_first_images,
)


def evaluated(model: Any, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Give a model random weights and return them with an input and the output, keys as in an archive."""
    random = np.random.RandomState(seed)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for layer in model.layers:
        for variable in layer.weights:
            value = 0.3 * random.standard_normal(variable.shape)
            if variable.path.endswith("variance"):
                value = 1 + np.abs(value)
            variable.assign(value.astype(np.float32))
            path = variable.path.rpartition(f"{layer.name}/")[2]
            arrays[f"weight/{layer.name}/{path}"] = np.asarray(variable.value.detach().cpu(), dtype=np.float32)
    shape = (2, *model.input_shape[1:])
    words = model.name == "tokens"
    x = random.randint(0, 20, shape) if words else random.standard_normal(shape)
    arrays["x"] = x.astype(np.int64 if words else np.float32)
    arrays["y"] = np.asarray(model(arrays["x"], training=False).detach().cpu())
    return arrays


def main() -> None:
    """Write all models."""
    import keras

    DATA.mkdir(parents=True, exist_ok=True)
    for number, make in enumerate(MODELS):
        keras.utils.clear_session()
        model = make()
        (DATA / f"{model.name}.json").write_text(model.to_json() + "\n")
        np.savez_compressed(DATA / f"{model.name}.npz", **evaluated(model, number))
        model.save_weights(DATA / f"{model.name}.weights.h5")
        if make is series:
            model.save(DATA / f"{model.name}.keras")


if __name__ == "__main__":
    main()
