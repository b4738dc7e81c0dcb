"""Dynamic convolutions: drop-in replacements of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from kw_lightning.nn.engine import (
    Convolution,
    Epilogue,
    dynamic_convolution,
    evaluates,
)
from kw_lightning.nn.evaluation import call_operator
from kw_lightning.nn.layer import NOTHING, KWLayer, gated
from kw_lightning.nn.partition import Shape
from kw_lightning.nn.precision import compute_type, in_type
from kw_lightning.nn.warehouse import Warehouse

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class KWConvNd(KWLayer):
    """A dynamic convolution over so many dimensions; arguments as torch's."""

    dimensions: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Shape,
        stride: int | Shape = 1,
        padding: int | Shape | str = 0,
        dilation: int | Shape = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = self._sides("kernel_size", kernel_size)
        self.stride = self._sides("stride", stride)
        self.dilation = self._sides("dilation", dilation)
        self.padding = padding if isinstance(padding, str) else self._sides("padding", padding)
        self.padding_mode = padding_mode
        self.kernel_shape = (out_channels, in_channels // groups, *self.kernel_size)
        before, after = self._padding_sides()
        # What the convolution cannot pad itself: unequal sides, and other values than zeros.
        self._pad_first = padding_mode != "zeros" or before != after
        self._padding = (0,) * self.dimensions if self._pad_first else before
        self._pad = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        self._make_bias(out_channels, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every sample with its own kernel.

        Args:
            x: [batch, in_channels, *size], or one sample [in_channels, *size].

        Returns:
            [batch, out_channels, *output size].

        Raises:
            RuntimeError: the layer has no warehouse yet; **or** x does not have the layer's channels or type, **or** is
                smaller than the kernel.
            ValueError: an engine that cannot compute the layer, see `kw_lightning.nn.engine`.
        """
        if isinstance(x, Proxy):
            return self._traced(x, x.tracer)  # type: ignore[no-any-return]
        return self.finished(x, NOTHING)

    def finished(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        """Return what becomes of the layer's output for x, see `forward`: in plain evaluation, done where it is made.

        Args:
            epilogue: without scale and bias, which the layer has of its own; but for `NOTHING`, only where the engine
                `evaluates`.
        """
        called = self._called
        if called is None:
            return self._convolve(x, None, epilogue)
        y: Tensor = called(x, partial(self._convolve, epilogue=epilogue))
        return y

    def _convolve(self, x: Tensor, called: Warehouse | None, epilogue: Epilogue) -> Tensor:
        """Return what `finished` does; `called` as in `_attend`."""
        y = self._at_once(x, epilogue) if called is None else None
        if y is not None:
            return y
        warehouse, _, attention = self._attached(called)
        cells = warehouse.cells
        if isinstance(cells, Proxy):
            return self._traced(x, cells.tracer)  # type: ignore[no-any-return]
        single = x.dim() == self.dimensions + 1
        if single:
            x = x.unsqueeze(0)
        if x.dim() != self.dimensions + 2 or x.shape[1] != self.in_channels:
            sides = ", ".join(["size"] * self.dimensions)
            raise RuntimeError(f"expected x of [batch, {self.in_channels}, {sides}]: found {list(x.shape)}")
        dtype = compute_type(x, cells)
        x, weights, gates = self._attend(x, called)
        x = gated(in_type(x, dtype), gates.input, self.dimensions + 1)
        if self._pad_first:
            x = F.pad(x, self._pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        convolution = self._convolution()
        convolution.check_size(tuple(x.shape[2:]))
        within = self._within(epilogue, gates, x) if attention.dynamic else None
        if attention.dynamic:
            y = dynamic_convolution(x, weights, cells, convolution, self.engine, within)
        else:
            assert isinstance(weights, Tensor)  # factors are a dynamic attention's
            kernel = self._one_kernel(weights, cells, dtype)
            y = CONVOLVE[self.dimensions](x, kernel, None, self.stride, self._padding, self.dilation, self.groups)
        if within is None:
            y = epilogue.apply(self._finish(gated(y, gates.output, self.dimensions + 1), self.dimensions + 1))
        return y.squeeze(0) if single else y

    @property
    def _attention_channels(self) -> int:
        return self.in_channels

    def _at_once(self, x: Tensor, epilogue: Epilogue = NOTHING) -> Tensor | None:
        """Return what `finished` does where that is one call, **or** in plain evaluation one operator of a graph."""
        if torch.compiler.is_compiling():
            plain = self._is_own and evaluates(self.engine, x)
            return call_operator(self, x, epilogue) if plain else None
        return super()._at_once(x, epilogue)

    @property
    def _is_own(self) -> bool:
        return type(self) in CONVOLUTIONS

    @property
    def _geometry(self) -> tuple[Any, ...]:
        return self.kernel_shape, self.stride, self._padding, self.dilation, self.groups, self._pad_first

    def _takes(self, x: Tensor) -> bool:
        return not self._pad_first and x.dim() == len(self.kernel_shape) and x.shape[1] == self.in_channels

    def _convolution(self) -> Convolution:
        cell_shape = self._attached()[1].cell_shape
        return Convolution(self.kernel_shape, cell_shape, self.stride, self._padding, self.dilation, self.groups)

    def _sides(self, name: str, value: int | Shape) -> Shape:
        sides = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(sides) != self.dimensions:
            raise ValueError(f"{name} needs {self.dimensions} numbers: found {value}")
        return sides

    def _padding_sides(self) -> tuple[Shape, Shape]:
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0,) * self.dimensions, (0,) * self.dimensions
        if self.padding != "same":
            raise ValueError(f'padding is a number, one per dimension, "same" or "valid": found "{self.padding}"')
        if any(side != 1 for side in self.stride):
            raise ValueError(f'padding "same" needs stride 1: found {self.stride}')
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.dimensions:
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self.dimensions:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text + (f", warehouse={self.warehouse.name!r}" if self.warehouse else "")


class KWConv1d(KWConvNd):
    """Dynamic 1-D convolution; arguments as `nn.Conv1d`. x: [batch, in_channels, length]."""

    dimensions = 1


class KWConv2d(KWConvNd):
    """Dynamic 2-D convolution; arguments as `nn.Conv2d`. x: [batch, in_channels, height, width].

    Example:
        >>> layers = [KWConv2d(8, 16, 3, padding=1), KWConv2d(16, 16, 3, padding=1)]
        >>> share_warehouse(layers, budget=1)
        >>> layers[0](torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 16, 9, 9])
    """

    dimensions = 2


class KWConv3d(KWConvNd):
    """Dynamic 3-D convolution; arguments as `nn.Conv3d`. x: [batch, in_channels, depth, height, width]."""

    dimensions = 3


CONVOLUTIONS: tuple[type[KWConvNd], ...] = (KWConv1d, KWConv2d, KWConv3d)
