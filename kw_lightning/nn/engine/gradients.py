"""Memory for the results of the paths' backward passes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kw_lightning.nn.engine.workspace import HUGE_BYTES, in_huge_pages
from kw_lightning.nn.precision import PLAIN

FREE = 2
"""Uses of a storage that nobody else has: one by the tensor kept here, one by the object that looks at it."""

_last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


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

    Those of α and E are summed over chunks, so they are of at least single precision. `collected`, if given, is E's.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    of_cells = collected
    if of_cells is None and needed[2]:
        of_cells = gradient_of(cells, exact)
    return Gradients(
        in_huge_pages(torch.empty_like(x)) if needed[0] else None,
        torch.zeros(attention.shape, dtype=exact, device=x.device) if needed[1] else None,
        of_cells if needed[2] else None,
        adds=collected is not None,
    )


def gradient_of(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a gradient of cells: that of their last one, if nothing else uses it any more.

    If it were allocated again at every step, memory this large would be new to the process, and page faults, which may
    be of small pages, would take up to several times as long as writing the gradient.
    """
    numbers = cells.numel()
    large = numbers * dtype.itemsize >= HUGE_BYTES and cells.device.type == "cpu"
    if not large or not cells.is_leaf or type(cells) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0:
        return in_huge_pages(torch.empty(cells.shape, dtype=dtype, device=cells.device))
    with _lock:
        last: Tensor | None = _last.get(cells)
        if last is None or last.dtype != dtype or not _is_free(last, numbers):
            last = _last[cells] = in_huge_pages(torch.empty(numbers, dtype=dtype, device="cpu"))
        return last.detach().view(cells.shape)


def _is_free(memory: Tensor, numbers: int) -> bool:
    storage = memory.untyped_storage()
    whole = storage.nbytes() == numbers * memory.itemsize
    return whole and torch._C._storage_Use_Count(storage._cdata) == FREE


def imagine_gradients(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Return tensors like a backward operator's: the gradient of x has its layout, the others are contiguous."""
    formats = torch.preserve_format, *[torch.contiguous_format] * (len(tensors) - 1)
    return [
        torch.empty_like(tensor, memory_format=format) if need else tensor.new_empty(0)
        for tensor, need, format in zip(tensors, needed, formats, strict=True)
    ]
