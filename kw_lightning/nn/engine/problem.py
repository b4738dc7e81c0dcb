"""What a path is asked to compute: the shapes by which it is chosen, and the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine import kept
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.ranks import Ranked
from kw_lightning.nn.partition import Shape


class Problem(NamedTuple):
    """Everything by which a path is chosen: one layer's convolution of one batch, forward or backward.

    A tuple, since one is made and hashed at every call of a layer.

    Attributes:
        convolution: the geometry.
        batch: samples.
        size: of the input.
        cells: n.
        dtype: of the input, in which all is computed.
        device: of the input.
        backward: the gradients are to be computed instead of the output.
        width: of the attention's hidden layer, where its factors are given; None where only α is.
        kept: bases mixed from the factors may be kept: the weights do not change, and there is room.
    """

    convolution: Convolution
    batch: int
    size: Shape
    cells: int
    dtype: torch.dtype
    device: torch.device
    backward: bool = False
    width: int | None = None
    kept: bool = False

    @classmethod
    def of(
        cls,
        x: Tensor,
        attention: Tensor | AttentionFactors,
        cells: Tensor,
        convolution: Convolution,
        *,
        backward: bool = False,
    ) -> Problem:
        """Return the problem of these tensors, by their shapes alone; an attention may be given by its factors."""
        problem = cls(convolution, x.shape[0], tuple(x.shape[2:]), len(cells), x.dtype, x.device, backward)
        if isinstance(attention, Tensor):
            return problem
        return problem._replace(width=attention.hidden.shape[1], kept=kept.may_keep(attention, cells))

    @property
    def on_cpu(self) -> bool:
        """Return whether the tensors are a CPU's."""
        return self.device.type == "cpu"

    def handed_over(self) -> Problem:
        """Return the problem as a path gets it: backward on a CPU, without the positions that a strided 1×1 skips."""
        dense = self.convolution.without_stride() if self.backward and self.on_cpu else None
        if dense is None:
            return self
        return self._replace(convolution=dense, size=self.convolution.output_size(self.size))


class Operands(NamedTuple):
    """The tensors of one call, all of one type and on one device.

    Attributes:
        x: [batch, in_channels, *size], in any memory format.
        attention: α [batch, mixtures, cells], **or** weights of the bases, [batch, mixtures, ranks]; contiguous.
        cells: E [cells, co, ci, *ck], contiguous.
        convolution: the geometry.
        ranked: the bases, for a path that mixes them; None for all others.
        collected: a gradient of E in single precision, to which a path may add its own; None where there is none.
    """

    x: Tensor
    attention: Tensor
    cells: Tensor
    convolution: Convolution
    ranked: Ranked | None = None
    collected: Tensor | None = None
