"""Memory formats of maps [batch, channels, *size]: channels first or last."""

from __future__ import annotations

from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution


def empty_output(x: Tensor, convolution: Convolution) -> Tensor:
    """Return an uninitialised output for x [batch, in_channels, *size], in x's memory format."""
    size = convolution.output_size(tuple(x.shape[2:]))
    shape = (x.shape[0], convolution.kernel_shape[0], *size)
    if channels_last(x):
        return x.new_empty(shape[0], *size, shape[1]).movedim(-1, 1)
    return x.new_empty(shape)


def channels_last(x: Tensor) -> bool:
    """Return whether x [batch, channels, *size] has its channels last in memory, and not first as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def first_or_last(x: Tensor) -> Tensor:
    """Return x with its channels first or last in memory: a copy if need be."""
    return x if x.is_contiguous() or channels_last(x) else x.contiguous()
