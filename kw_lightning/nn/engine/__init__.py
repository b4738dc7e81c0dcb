"""The engine: computes dynamic convolutions and linear layers from input, attention and cells."""

from __future__ import annotations

from torch import Tensor

from kw_lightning.nn.engine import reference
from kw_lightning.nn.engine.convolution import Convolution

__all__ = ["Convolution", "dynamic_convolution", "dynamic_linear"]


def dynamic_convolution(
    x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, engine: str = "auto"
) -> Tensor:
    """Convolve every sample with its own mixture of cells.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        convolution: the geometry.
        engine: which order of contraction to use.

    Returns:
        [batch, out_channels, *output size].
    """
    return reference.convolve(x, attention, cells, convolution)


def dynamic_linear(
    x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, engine: str = "auto"
) -> Tensor:
    """Multiply every sample's tokens by its own mixture of cells.

    Args:
        x: [batch, tokens, in_features].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci].
        convolution: the geometry, without spatial dimensions.
        engine: which order of contraction to use.

    Returns:
        [batch, tokens, out_features].
    """
    return reference.apply_linear(x, attention, cells, convolution)
