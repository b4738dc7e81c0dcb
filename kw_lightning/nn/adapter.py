"""A frozen layer with a low-rank dynamic one beside it, to train few numbers where a whole network is there already.

Source of the form: LoRA (Hu et al., ICLR 2022), https://arxiv.org/abs/2106.09685. Here both factors are dynamic, with
cells in warehouses. A dynamic factor has a kernel for every sample, so that there is no one kernel to merge it into.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kw_lightning.nn.layer import KWLayer


class Adapted(nn.Module):
    """y = frozen(x) + up(down(x)).

    With the cells of `up` at zero, as they start, y is what the frozen layer gives, to the bit.

    Args:
        frozen: a convolution or linear layer.
        down: dynamic, to `rank` channels, with the frozen layer's kernel size, stride, padding and dilation.
        up: dynamic, from `rank` channels, with a kernel of size 1.
    """

    def __init__(self, frozen: nn.Module, down: KWLayer, up: KWLayer) -> None:
        super().__init__()
        self.frozen, self.down, self.up = frozen, down, up
        self.training = frozen.training

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank part to what the frozen layer gives; shapes are the frozen layer's."""
        y: Any = self.frozen(x)
        return y + self.up(self.down(x))  # type: ignore[no-any-return]


def count_trainable(network: nn.Module) -> tuple[int, int]:
    """Return the parameters that train, and all; cells that several layers share once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def trainable_line(trainable: int, total: int) -> str:
    """Return both counts in the line that PEFT's `print_trainable_parameters` writes."""
    share = 100 * trainable / max(total, 1)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
