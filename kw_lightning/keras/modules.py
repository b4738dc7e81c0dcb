"""The modules that PyTorch lacks: plain, picklable, ready for torch.compile and torch.export.

Notation used for tensor shapes: b batch, c channels, t tokens, d features, * any further sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.keras.shapes import same_padding


class SamePadding(nn.Module):
    """Keras's "same" padding before a window with strides, for any input size: see `same_padding`."""

    def __init__(
        self, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], value: float = 0.0
    ) -> None:
        super().__init__()
        self.kernel, self.strides, self.dilation = tuple(kernel), tuple(strides), tuple(dilation)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Pad x [b, c, *size]; max pooling pads with -inf."""
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(x.shape[2:], self.kernel, self.strides, self.dilation, strict=True):
            pads = [*same_padding(size, kernel, stride, dilation), *pads]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self) -> str:
        return f"{self.kernel}, strides={self.strides}, dilation={self.dilation}, value={self.value}"


class SameAveragePool(nn.Module):
    """Average pooling with "same" padding that leaves the padding out of the mean, as Keras does. x: [b, c, *size]."""

    def __init__(self, kernel: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.strides = list(kernel), list(strides)
        self.pad = SamePadding(kernel, strides, [1] * len(kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean [b, c, *size] over the positions inside x."""
        inside = self.pad(torch.ones_like(x[:1, :1]))
        return self._pool(self.pad(x)) / self._pool(inside)

    def _pool(self, x: Tensor) -> Tensor:
        pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        return pool(x, self.kernel, self.strides)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.kernel}, strides={self.strides}"


class GlobalPool(nn.Module):
    """Mean or maximum over all positions. x: [b, c, *size] → [b, c], with `keepdims` [b, c, 1 …]."""

    def __init__(self, kind: str, keepdims: bool = False) -> None:
        super().__init__()
        self.kind, self.keepdims = kind, keepdims

    def forward(self, x: Tensor) -> Tensor:
        """Pool x [b, c, *size]."""
        axes = tuple(range(2, x.dim()))
        return x.mean(axes, self.keepdims) if self.kind == "average" else x.amax(axes, self.keepdims)

    def extra_repr(self) -> str:
        return f"{self.kind}, keepdims={self.keepdims}"


class AxisLayerNorm(nn.LayerNorm):
    """LayerNorm over another axis than the last, as over the channels of every position. x: [b, *, size, *]."""

    def __init__(self, size: int, axis: int, eps: float, affine: bool = True) -> None:
        super().__init__(size, eps=eps, elementwise_affine=affine)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x over the axis."""
        return super().forward(x.movedim(self.axis, -1)).movedim(-1, self.axis)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"


class ClippedReLU(nn.Module):
    """Keras's ReLU with a threshold: max_value from there on, x from `threshold`, negative_slope below it."""

    def __init__(self, max_value: float | None, negative_slope: float, threshold: float) -> None:
        super().__init__()
        self.max_value, self.negative_slope, self.threshold = max_value, negative_slope, threshold

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise to x of any shape."""
        y = torch.where(x > self.threshold, x, torch.zeros_like(x))
        if self.max_value is not None:
            y = y.clamp(max=self.max_value)
        return y if self.negative_slope == 0 else y - self.negative_slope * (self.threshold - x).clamp(min=0)

    def extra_repr(self) -> str:
        return f"max_value={self.max_value}, negative_slope={self.negative_slope}, threshold={self.threshold}"


class PReLU(nn.Module):
    """max(x, 0) + alpha · min(x, 0) with Keras's alpha: one for each element of a sample, some axes shared."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(tuple(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [b, *shape]."""
        return x.clamp(min=0) + self.alpha * x.clamp(max=0)

    def extra_repr(self) -> str:
        return f"{tuple(self.alpha.shape)}"


class FunctionModule(nn.Module):
    """One of torch's functions as a module: Keras's activations without an `nn` class."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise to x of any shape."""
        return getattr(torch, self.name)(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return self.name


class Reshape(nn.Module):
    """Give every sample another shape. x: [b, *] → [b, *shape]."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape x [b, *]."""
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}"


class Permute(nn.Module):
    """Reorder the axes of every sample; `dims` count from 1, as in Keras."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Permute x [b, *]; the memory is laid out anew, so that what follows runs at full speed."""
        return x.permute(0, *self.dims).contiguous()

    def extra_repr(self) -> str:
        return f"{self.dims}"


class Merge(nn.Module):
    """Combine several inputs elementwise: add, subtract, multiply, average, maximum."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *inputs: Tensor) -> Tensor:
        """Combine inputs of one shape, or with sides of 1 that fit any."""
        y, *others = inputs
        for x in others:
            if self.operation in ("add", "average"):
                y = y + x
            elif self.operation == "subtract":
                y = y - x
            elif self.operation == "multiply":
                y = y * x
            else:
                y = torch.maximum(y, x)
        return y / len(inputs) if self.operation == "average" else y

    def extra_repr(self) -> str:
        return self.operation


class Concatenate(nn.Module):
    """Join several inputs along an axis; the batch is axis 0."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *inputs: Tensor) -> Tensor:
        """Join the inputs."""
        return torch.cat(inputs, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class LayerScale(nn.Module):
    """x · gamma, one number a channel (CaiT, ConvNeXt). x: [b, *, size, *]."""

    def __init__(self, shape: Sequence[int], init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full(tuple(shape), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x."""
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{tuple(self.gamma.shape)}, init_values={self.init_values}"


class Embedding(nn.Embedding):
    """A learnt vector for each number, which is cast to a whole one first, as in Keras. x: [b, *] → [b, *, d]."""

    def forward(self, x: Tensor) -> Tensor:
        """Look the numbers up."""
        return super().forward(x if x.dtype in (torch.int32, torch.int64) else x.long())


class PositionEmbedding(nn.Module):
    """Add a learnt vector to each token. x: [b, t, d]."""

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + position."""
        return x + self.position

    def extra_repr(self) -> str:
        return f"{tuple(self.position.shape)}"


class ClassToken(nn.Module):
    """Put a learnt token before the others. x: [b, t, d] → [b, t + 1, d]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Prepend the token."""
        return torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)

    def extra_repr(self) -> str:
        return f"{self.token.numel()}"


class SelectToken(nn.Module):
    """Take one token out of the sequence. x: [b, t, d] → [b, d]."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the token."""
        return x[:, self.index]

    def extra_repr(self) -> str:
        return f"{self.index}"


class MultiHeadAttention(nn.Module):
    """Self- or cross-attention with its four projections as layers of their own, each of which can be dynamic.

    Keras: https://keras.io/api/layers/attention_layers/multi_head_attention
    """

    def __init__(
        self,
        query_features: int,
        key_features: int,
        value_features: int,
        *,
        heads: int,
        key_dim: int,
        value_dim: int,
        output_features: int,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.dropout = heads, key_dim, value_dim, dropout
        self.query = nn.Linear(query_features, heads * key_dim, bias=bias)
        self.key = nn.Linear(key_features, heads * key_dim, bias=bias)
        self.value = nn.Linear(value_features, heads * value_dim, bias=bias)
        self.output = nn.Linear(heads * value_dim, output_features, bias=bias)

    def forward(self, query: Tensor, value: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: [b, t, d].
            value: [b, s, e]; None means the query: self-attention.
            key: [b, s, f]; None means the value.

        Returns:
            [b, t, output features].
        """
        value = query if value is None else value
        key = value if key is None else key
        y = F.scaled_dot_product_attention(
            self._split(self.query(query), self.key_dim),
            self._split(self.key(key), self.key_dim),
            self._split(self.value(value), self.value_dim),
            dropout_p=self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(self.key_dim),
        )  # [b, heads, t, value_dim]
        return self.output(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor, features: int) -> Tensor:
        return x.unflatten(-1, (self.heads, features)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, dropout={self.dropout}"
