"""The `weight` of a dynamic layer, for code that reads the weight of a static one.

It has the shape, type and device of the kernel that the layer stands for, and no numbers, since every sample has a
kernel of its own. What would compute with it is told so, naming the layer; only factors of the output channels are
kept, by which `torch.nn.utils.fusion` and ultralytics fold a batch norm into the layer before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kw_lightning.errors import KWError, times

PRODUCTS: tuple[Any, ...] = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)

# Python looks these up on the class, past `__getattr__`.
OPERATORS = (
    *(f"__{side}{name}__" for name in ("add", "sub", "truediv", "matmul", "pow") for side in ("", "r")),
    *("__neg__", "__abs__", "__getitem__", "__setitem__", "__iter__", "__float__", "__array__"),
)


class DynamicWeightError(KWError, AttributeError):
    """Code asks a dynamic layer for the numbers of its weight."""


class DynamicWeight:
    """Shape, type and device of a dynamic layer's kernel; no tensor, so that no parameter or state holds it.

    Args:
        name: of the layer.
        shape: [out_channels, in_channels / groups, *kernel_size].
        like: has the kernel's type and device.
        scale: [out_channels], factors of the output channels; None for none.
    """

    grad = None
    is_sparse = is_quantized = is_nested = False
    layout = torch.strided

    def __init__(
        self, name: str, shape: Sequence[int], like: Tensor | DynamicWeight, scale: Tensor | None = None
    ) -> None:
        self.name, self.shape, self.scale = name, torch.Size(shape), scale
        self.dtype: torch.dtype = like.dtype
        self.device: torch.device = like.device
        self.requires_grad: bool = like.requires_grad
        self.ndim = len(self.shape)

    @property
    def data(self) -> DynamicWeight:
        """Return the same: there are no numbers to tell from it."""
        return self

    @property
    def is_cuda(self) -> bool:
        """Return whether the kernel is on a GPU."""
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        """Return whether the kernel is on the meta device."""
        return self.device.type == "meta"

    @property
    def itemsize(self) -> int:
        """Return the bytes of one number."""
        return self.dtype.itemsize

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one side of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Return how many numbers the static kernel would have."""
        return self.shape.numel()

    nelement = numel

    def element_size(self) -> int:
        """Return the bytes of one number."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Return whether the kernel's numbers are real."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """Return whether the kernel's numbers are complex."""
        return self.dtype.is_complex

    def detach(self) -> DynamicWeight:
        """Return the same: it has no gradient."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> DynamicWeight:
        """Return the same: whether cells are trained is theirs to say."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> DynamicWeight:
        """Return the same: cells are moved with their network."""
        return self

    def __mul__(self, factors: Any) -> DynamicWeight:
        """Return the weight times factors of its output channels."""
        rows = (self.shape[0], *[1] * (self.ndim - 1))
        if not isinstance(factors, Tensor) or tuple(factors.shape) != rows:
            raise self._error("a product other than by factors of the output channels")
        scale = factors.detach().flatten()
        return DynamicWeight(self.name, self.shape, self, scale if self.scale is None else self.scale * scale)

    __rmul__ = mul = multiply = __mul__

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") or attribute in ("name", "_is_param"):
            raise AttributeError(attribute)
        raise self._error(attribute)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = next(value for value in _flat((args, kwargs or {})) if isinstance(value, cls))
        if function in PRODUCTS and len(args) == 2 and not kwargs:
            return found * (args[1] if args[0] is found else args[0])
        raise found._error(getattr(function, "__name__", str(function)))

    def without_parameter(self) -> DynamicWeightError:
        """Return the error of who takes the weight for a parameter of the layer's."""
        return DynamicWeightError(
            f'"{self.name}" is dynamic: every sample has a kernel of its own, so its weight is no parameter to prune. '
            'Its cells are one, of all layers of its warehouse: prune.l1_unstructured(layer.warehouse, "cells", amount)'
        )

    def __repr__(self) -> str:
        return f"DynamicWeight({self.name!r}, {times(self.shape)}, {self.dtype}, {self.device})"

    def _error(self, what: str) -> DynamicWeightError:
        return DynamicWeightError(
            f'"{self.name}" is dynamic: every sample has a kernel of its own, so its weight has a shape, a type and a '
            f"device but no numbers for {what}. Call the layer instead, or keep it static by exclude in the recipe"
        )


def _refused(operator: str) -> Any:
    def method(self: DynamicWeight, *_: Any) -> Any:
        raise self._error(operator.strip("_"))

    return method


for _operator in OPERATORS:
    setattr(DynamicWeight, _operator, _refused(_operator))


def over_rows(factors: Tensor, dimensions: int) -> Tensor:
    """Return factors [channels] as [channels, 1, …] of so many dimensions, to multiply or add channel by channel."""
    return factors.view(-1, *[1] * (dimensions - 1))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return _flat(list(value.values()))
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list | tuple) else [value]
