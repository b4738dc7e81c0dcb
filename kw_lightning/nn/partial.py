"""A layer of which only some output channels are dynamic: the value third of a fused `qkv` projection, for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.nn.layer import KWLayer
from kw_lightning.nn.weight import DynamicWeight


class PartialLayer(nn.Module):
    """Several layers on the same input, their outputs one after the other: static rows beside dynamic ones.

    Args:
        parts: ordinary and dynamic layers (`nn.Linear` and `KWLinear`, `nn.Conv2d` and `KWConv2d`, …), in the order of
            their output channels; every layer's bias and geometry is that of the layer that they replace.

    Example:
        >>> value = KWLinear(192, 192)
        >>> share_warehouse([value])
        >>> PartialLayer([nn.Linear(192, 384), value])(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 576])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # Linear layers have their channels last, convolutions before the positions, with or without a batch.
        self._linear = isinstance(parts[0], nn.Linear) or getattr(parts[0], "channels_last", False)
        self._dimensions = 0 if self._linear else len(parts[0].kernel_size)  # type: ignore[arg-type]
        for name in ("in_features", "out_features", "in_channels", "out_channels"):
            sizes = [getattr(part, name) for part in parts if hasattr(part, name)]
            if sizes:  # networks ask their layers for these
                setattr(self, name, sum(sizes) if name.startswith("out") else sizes[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all parts, concatenated over their channels.

        Args:
            x: [batch, *tokens, in_features] or [batch, in_channels, *size], as the parts take it.
        """
        dimension = -1 if self._linear else -1 - self._dimensions
        return torch.cat([part(x) for part in self.parts], dim=dimension)

    @property
    def weight(self) -> DynamicWeight:
        """Return the shape, type and device of the static kernel; see `KWLayer.weight`."""
        dynamic = self.dynamic_parts[0]
        weights: list[Any] = [part.weight for part in self.parts]
        rows = sum(weight.shape[0] for weight in weights)
        return DynamicWeight(dynamic.name, (rows, *dynamic.kernel_shape[1:]), dynamic.weight)

    @property
    def dynamic_parts(self) -> list[KWLayer]:
        """Return the parts that draw on a warehouse."""
        return [part for part in self.parts if isinstance(part, KWLayer)]
