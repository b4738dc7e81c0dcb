"""What a path is: one way to compute a dynamic convolution, forward and backward."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kw_lightning.nn.engine.costs import Fitted, Load
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.problem import Operands, Problem


class Path(Protocol):
    """One way to compute a dynamic convolution.

    Attributes:
        name: its order and its method, also its file in this folder: "mix_kernels/compiled".
        fitted, fitted_gpu: seconds per unit of its load on a CPU and on a GPU; None where it has not been timed.
        of_bases: it mixes bases, which the attention's factors give, instead of cells.
        multiple: α that is made for it is padded with zeros to a multiple of so many cells.
    """

    name: ClassVar[str]
    fitted: ClassVar[Fitted | None] = None
    fitted_gpu: ClassVar[Fitted | None] = None
    of_bases: ClassVar[bool] = False
    multiple: ClassVar[int] = 1

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can: the geometry's reasons before the machine's."""
        ...

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem that it can compute; None where it may be."""
        return None

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which it computes on tensors of a type; they are converted to it first."""
        return dtype

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass, of a problem that it can compute."""
        ...

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel.

        Args:
            operands: of a problem that it can compute, in which something besides padding is read.
            y: [batch, out_channels, *output_size] in the memory format of x, overwritten.
        """
        ...

    def forward_finished(self, operands: Operands, y: Tensor, epilogue: Epilogue) -> Tensor:
        """Return the convolution after the epilogue, in y or another tensor; arguments are as in `forward`."""
        self.forward(operands, y)
        return epilogue.apply(y)

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients.

        Args:
            gradient: of the output, [batch, out_channels, *output_size], in any memory format.
            operands: as in `forward`.
            needed: which of the gradients of (x, α, E) to compute; where it mixes bases, those of the bases and their
                weights in place of α's.
        """
        ...


def order_of(path: Path) -> str:
    """Return the order of contraction of a path."""
    return path.name.partition("/")[0]
