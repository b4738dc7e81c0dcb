"""The vocabulary: importing this package registers every layer kind."""

from kw_lightning.keras.layers import (
    activation,
    attention,
    convolution,
    dense,
    merging,
    normalization,
    pooling,
    regularization,
    reshaping,
)

__all__ = [
    "activation",
    "attention",
    "convolution",
    "dense",
    "merging",
    "normalization",
    "pooling",
    "regularization",
    "reshaping",
]
