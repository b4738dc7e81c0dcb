"""What is to be computed: its shapes, by which a path is chosen, and its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.partition import Shape


class Problem(NamedTuple):
    """All by which a way of computing is chosen: one layer's convolution of one batch, forward or backward.

    A tuple, since one is made and hashed at every call of a layer.

    Attributes:
        convolution: the geometry.
        batch: samples.
        size: of the input.
        cells: n.
        dtype: of the input, in which all is computed.
        device: of the input.
        backward: the gradients are to be computed instead of the output.
    """

    convolution: Convolution
    batch: int
    size: Shape
    cells: int
    dtype: torch.dtype
    device: torch.device
    backward: bool = False

    @classmethod
    def of(cls, x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool) -> Problem:
        """Return what is to be computed of tensors, by their shapes alone."""
        return cls(convolution, x.shape[0], tuple(x.shape[2:]), len(cells), x.dtype, x.device, backward)

    @property
    def on_cpu(self) -> bool:
        """Return whether the tensors are a CPU's."""
        return self.device.type == "cpu"


class Operands(NamedTuple):
    """The tensors of one call, all of one type and on one device.

    Attributes:
        x: [batch, in_channels, *size], in any memory format.
        attention: α [batch, mixtures, cells], contiguous.
        cells: E [cells, co, ci, *ck], contiguous.
        convolution: the geometry.
    """

    x: Tensor
    attention: Tensor
    cells: Tensor
    convolution: Convolution

    def problem(self, *, backward: bool) -> Problem:
        """Return what is to be computed, by shapes alone."""
        return Problem.of(self.x, self.cells, self.convolution, backward=backward)
