"""What an engine needs to know of a convolution beside its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kw_lightning.nn.partition import Shape, mixture_grid


@dataclass(frozen=True)
class Convolution:
    """The geometry of one dynamic convolution; a linear layer has no spatial dimension.

    Attributes:
        kernel_shape: [out_channels, in_channels / groups, *kernel_size].
        cell_shape: [co, ci, *ck].
        stride, padding, dilation: one number per spatial dimension.
        groups: of the convolution itself.
    """

    kernel_shape: Shape
    cell_shape: Shape
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1

    @property
    def dimensions(self) -> int:
        """Return the number of spatial dimensions."""
        return len(self.kernel_shape) - 2

    @property
    def grid(self) -> tuple[Shape, int, int]:
        """Return (spatial cells per dimension, output groups, input groups), the mixtures slowest first."""
        return mixture_grid(self.kernel_shape, self.cell_shape)

    def output_size(self, size: Shape) -> Shape:
        """Return the spatial size of the output for an input of the given spatial size."""
        sides = zip(size, self.kernel_shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)

    def check_size(self, size: Shape) -> None:
        """Check that an input of a spatial size, padding included, holds the kernel.

        Raises:
            RuntimeError: it does not; in the words of torch's convolutions.
        """
        padded = [n + 2 * p for n, p in zip(size, self.padding, strict=True)]
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel_shape[2:], self.dilation, strict=True)]
        if any(n < k for n, k in zip(padded, reach, strict=True)):
            found, kernel = (" x ".join(map(str, sides)) for sides in (padded, reach))
            raise RuntimeError(
                f"Calculated padded input size per channel: ({found}). Kernel size: ({kernel}). "
                "Kernel size can't be greater than actual input size"
            )

    @property
    def numbers(self) -> list[int]:
        """Return the geometry without the cells as one list, the form in which operators take it."""
        return [*self.kernel_shape, *self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of(cls, cell_shape: Sequence[int], numbers: Sequence[int]) -> Convolution:
        """Return a geometry from its cells [co, ci, *ck] and its `numbers`."""
        dimensions = len(cell_shape) - 2
        starts = range(2, len(numbers) - 1, dimensions)
        kernel, stride, padding, dilation = (tuple(numbers[start : start + dimensions]) for start in starts)
        return cls((*numbers[:2], *kernel), tuple(cell_shape), stride, padding, dilation, numbers[-1])

    def without_stride(self) -> Convolution | None:
        """Return a strided 1×1 convolution as one over its `read` positions alone; None for any other."""
        ones = (1,) * self.dimensions
        if self.kernel_shape[2:] != ones or any(self.padding) or self.stride == ones:
            return None
        return replace(self, stride=ones)

    @property
    def read(self) -> tuple[slice, ...]:
        """Return the index of the positions of [batch, in_channels, *size] that a strided 1×1 convolution reads."""
        return (slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride))

    def over_tokens(self) -> Convolution:
        """Return a linear layer as a 1×1 convolution over its tokens."""
        return Convolution((*self.kernel_shape, 1), (*self.cell_shape, 1), (1,), (0,), (1,))
