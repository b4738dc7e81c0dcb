"""What is done to a layer's output before anything else reads it: a norm, the sum with another map, an activation.

A compiled pass does it as it writes the output (native/epilogue.h); after other paths, torch's operators do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine.layouts import channels_last

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
"""By name, in the order in which native/epilogue.h numbers them, from 1."""


class Norm(NamedTuple):
    """A batch norm with running statistics; all tensors are [channels]."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Epilogue:
    """act(norm(y · scale + bias) + added), of which any part may be missing.

    Attributes:
        scale, bias: [out_channels], the layer's own.
        norm: of the output.
        added: [batch, out_channels, *output_size], as the output.
        activation: one of `ACTIVATIONS`.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    norm: Norm | None = None
    added: Tensor | None = None
    activation: str | None = None

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors [out_channels]: scale, bias, and the norm's mean, variance, weight and bias."""
        return self.scale, self.bias, *(self.norm[:4] if self.norm is not None else (None,) * 4)

    @property
    def empty(self) -> bool:
        """Return whether there is nothing to do."""
        return all(part is None for part in (self.scale, self.bias, self.norm, self.added, self.activation))

    def fits(self, y: Tensor) -> bool:
        """Return whether a compiled pass that writes y can apply it: all tensors are dense, of its type and device."""
        for factor in self.factors:
            if factor is None:
                continue
            if not (_like(factor, y) and factor.shape == y.shape[1:2] and factor.is_contiguous()):
                return False
        added = self.added
        if added is None:
            return True
        return _like(added, y) and added.shape == y.shape and (added.is_contiguous() or channels_last(added))

    def apply(self, y: Tensor) -> Tensor:
        """Apply it to y [batch, out_channels, *output_size], which may be overwritten, and return the result."""
        shape = (-1, *[1] * (y.dim() - 2))
        if self.scale is not None:
            y = y.mul_(self.scale.to(y.dtype).view(shape))
        if self.bias is not None:
            y = y.add_(self.bias.to(y.dtype).view(shape))
        if self.norm is not None:
            mean, variance, weight, bias, epsilon = self.norm
            y = F.batch_norm(y, mean, variance, weight, bias, False, 0.0, epsilon)
        if self.added is not None:
            alike = self.added.dtype == y.dtype and self.added.shape == y.shape
            y = y.add_(self.added) if alike else y + self.added
        return y if self.activation is None else ACTIVATIONS[self.activation](y, inplace=True)  # type: ignore[operator]


def _like(tensor: Tensor, y: Tensor) -> bool:
    return tensor.dtype == y.dtype and tensor.device == y.device
