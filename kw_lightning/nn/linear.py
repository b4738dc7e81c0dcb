"""Dynamic linear layers: drop-in replacements of `nn.Linear`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from kw_lightning.nn.engine import (
    Convolution,
    dynamic_linear,
)
from kw_lightning.nn.layer import NOTHING, KWLayer, gated
from kw_lightning.nn.precision import compute_type, in_type
from kw_lightning.nn.warehouse import Warehouse


class KWLinear(KWLayer):
    """Dynamic linear layer; arguments as `nn.Linear`. x: [batch, *tokens, in_features]: one matrix a sample.

    Args:
        batch_dim: the dimension of x that is the batch; 1 for [sequence, batch, in_features].

    Attributes:
        beside: name of a module nearby that works on [sequence, batch, channels]; None where there is none, or where
            `batch_dim` was given. With such a module, the first input of three dimensions brings a warning.
    """

    channels_last = True
    beside: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        if batch_dim < 0:
            raise ValueError(f"batch_dim is a dimension, 0 or more: found {batch_dim}")
        self.in_features, self.out_features, self.batch_dim = in_features, out_features, batch_dim
        self.kernel_shape = (out_features, in_features)
        self._make_bias(out_features, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply every sample's tokens by the sample's own matrix.

        Args:
            x: [batch, *tokens, in_features], the batch at `batch_dim`; of fewer dimensions it is one sample.

        Returns:
            [batch, *tokens, out_features], the batch where it was.

        Raises:
            RuntimeError: the layer has no warehouse yet; **or** x does not have the layer's features or type.
        """
        if isinstance(x, Proxy):
            return self._traced(x, x.tracer)  # type: ignore[no-any-return]
        called = self._called
        return self._multiply(x) if called is None else called(x, self._multiply)

    def _multiply(self, x: Tensor, called: Warehouse | None = None) -> Tensor:
        """Return the output for x; `called` as in `_attend`."""
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"expected x of [batch, ..., {self.in_features}]: found {list(x.shape)}")
        warehouse, _, attention = self._attached(called)
        cells = warehouse.cells
        if isinstance(cells, Proxy):
            return self._traced(x, cells.tracer)  # type: ignore[no-any-return]
        if not attention.dynamic:
            dtype = compute_type(x, cells)
            return self._finish(F.linear(in_type(x, dtype), self._one_kernel(self.attend(x, called), cells, dtype)), 1)
        if x.dim() < self.batch_dim + 2:
            return self._apply_matrices(cells, x.unsqueeze(0), called).squeeze(0)
        if self.batch_dim:
            return self._apply_matrices(cells, x.movedim(self.batch_dim, 0), called).movedim(0, self.batch_dim)
        if self.beside is not None and x.dim() > 2 and not torch.compiler.is_compiling():
            self._doubt_batch(x)
        return self._apply_matrices(cells, x, called)

    def _apply_matrices(self, cells: Tensor, x: Tensor, called: Warehouse | None) -> Tensor:
        y = self._at_once(self.as_map(x)) if called is None else None
        if y is not None:
            return y.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)
        dtype = compute_type(x, cells)
        x, attention, gates = self._attend(x, called)
        tokens = in_type(x, dtype)
        tokens = tokens.unsqueeze(1) if x.dim() == 2 else tokens.flatten(1, -2)
        within = self._within(NOTHING, gates, x)
        y = dynamic_linear(gated(tokens, gates.input, 1), attention, cells, self._convolution(), self.engine, within)
        y = y if within is not None else self._finish(gated(y, gates.output, 1), 1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _doubt_batch(self, x: Tensor) -> None:
        warehouse = self._attached()[0]
        if not warehouse.doubted:
            warehouse.doubted = True
            warnings.warn(
                f'"{self.name}" takes dimension 0 of {list(x.shape)} for the batch, and stands beside "{self.beside}", '
                "which works on [sequence, batch, channels]. If the layer does too, its samples are mixed up: say "
                f'batch_dim: 1 in warehouse "{warehouse.name}". If it does not, say batch_dim: 0',
                stacklevel=3,
            )
        self.beside = None

    def as_map(self, x: Tensor) -> Tensor:
        """Return x [batch, *tokens, in_features] as [batch, in_features, tokens]."""
        return (x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)).transpose(1, 2)

    @property
    def _attention_channels(self) -> int:
        return self.in_features

    @property
    def _is_own(self) -> bool:
        return type(self) is KWLinear

    @property
    def _geometry(self) -> tuple[Any, ...]:
        return (self.kernel_shape,)

    def _takes(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[1] == self.in_features and x.shape[2] > 0

    def _over_positions(self) -> Convolution:
        return self._convolution().over_tokens()

    def _convolution(self) -> Convolution:
        return Convolution(self.kernel_shape, self._attached()[1].cell_shape)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}"
        if self.batch_dim:
            text += f", batch_dim={self.batch_dim}"
        if self.bias is None:
            text += ", bias=False"
        return text + (f", warehouse={self.warehouse.name!r}" if self.warehouse else "")
