"""Where the backward passes of the paths put their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine.workspace import in_huge_pages


@dataclass(frozen=True)
class Gradients:
    """Memory for the gradients that are needed, None for the others; filled by a backward pass.

    Attributes:
        x: as the pass takes the input, channels first or last; overwritten.
        attention: dα [batch, mixtures, cells], of at least single precision; added to.
        cells: dE [cells, co, …], of at least single precision; overwritten by the first chunk, added to by others.
        bases: of the bases by cells, [mixtures, ranks, cells], where `attention` is of their weights; else None.
        adds: `cells` is added to from the first chunk on.
    """

    x: Tensor | None
    attention: Tensor | None
    cells: Tensor | None
    bases: Tensor | None = None
    adds: bool = False

    @property
    def of_kernels(self) -> bool:
        """Return whether the gradient of the kernels is needed on the way."""
        return self.attention is not None or self.cells is not None


def new_gradients(
    x: Tensor, attention: Tensor, cells: Tensor, needed: Sequence[bool], collected: Tensor | None = None
) -> Gradients:
    """Make the tensors for the gradients needed of (x, α, E).

    α and E collect over chunks, so they are at least in single precision. With `collected`, that is E's, and added to.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    of_cells = collected
    if of_cells is None and needed[2]:
        of_cells = in_huge_pages(torch.empty(cells.shape, dtype=exact, device=x.device))
    return Gradients(
        in_huge_pages(torch.empty_like(x)) if needed[0] else None,
        torch.zeros(attention.shape, dtype=exact, device=x.device) if needed[1] else None,
        of_cells if needed[2] else None,
        adds=collected is not None,
    )


def imagine_gradients(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Return what a backward operator does in shape, type and layout: x's gradient lies as x, the others in order."""
    formats = torch.preserve_format, *[torch.contiguous_format] * (len(tensors) - 1)
    return [
        torch.empty_like(tensor, memory_format=format) if need else tensor.new_empty(0)
        for tensor, need, format in zip(tensors, needed, formats, strict=True)
    ]
