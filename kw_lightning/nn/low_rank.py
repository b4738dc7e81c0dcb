"""The low-rank attention's last weights multiplied out: its α then has the factors of the plain form, with its width.

z of another layer's cells is U·h times the basis P, both without a bias: V = P·U of a mixture gives the same at once.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kw_lightning.nn.engine import ranks
from kw_lightning.nn.engine.contents import contents_of, place
from kw_lightning.nn.precision import in_type

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


class LowRank(NamedTuple):
    """The shape of a layer's low-rank attention.

    Attributes:
        cells: n, of the warehouse.
        own: cells of the layer itself, from `first` on.
        first: the first of them.
        rank: r, of the basis that gives the others.
        width: h, of the hidden layer.
    """

    cells: int
    own: int
    first: int
    rank: int
    width: int

    def counts_less(self, batch: int, cell: int, *, along_rank: bool, still: bool) -> bool:
        """Return whether V multiplied out takes fewer multiply-adds than its two factors, mixing included.

        By V kernels may be mixed of bases, h + 1 a mixture, which are made once for a batch; by its factors z takes
        less where h is large, and of cells alone.

        Args:
            batch: samples.
            cell: numbers of a cell.
            along_rank: whether bases may be mixed instead of cells.
            still: the weights stand still: V and bases are made once for ever.
        """
        others, bases = self.cells - self.own, ranks.count(self.width)
        once = 0 if still else others * self.rank * self.width
        by_cells = batch * self.cells
        by_bases = bases * (batch + (0 if still else self.cells)) if along_rank else by_cells
        out = once + batch * (self.cells + 1) * self.width + cell * min(by_cells, by_bases)
        factors = batch * ((self.own + self.rank + 1) * self.width + others * self.rank) + cell * by_cells
        return out < factors


def multiply_out(weight: Tensor, basis: Tensor, form: LowRank) -> Tensor:
    """Return V [mixtures · (cells + 1), width].

    Args:
        weight: of the last linear layer, [mixtures · (own + rank + 1), width].
        basis: P [cells − own, rank].
        form: their shape.
    """
    own, compact, zero = weight.unflatten(0, (-1, form.own + form.rank + 1)).split([form.own, form.rank, 1], 1)
    others = torch.matmul(basis, compact)
    return torch.cat([others[:, : form.first], own, others[:, form.first :], zero], 1).flatten(0, 1)


def keep(weight: Tensor, basis: Tensor, form: LowRank, dtype: torch.dtype) -> Tensor:
    """Return V in a type as `multiply_out` does, without a gradient, and the same again while both stand still."""
    state = (dtype, *(place(tensor) for tensor in (weight, basis)))
    with torch.no_grad(), torch.inference_mode(False):
        contents = contents_of(weight), contents_of(basis)
        with _lock:
            found: tuple[Any, tuple[Tensor, ...], Tensor] | None = _kept.get(weight)
            if found is None or found[0] != state or not all(map(torch.equal, found[1], contents)):
                multiplied = multiply_out(in_type(weight, dtype), in_type(basis, dtype), form)
                found = _kept[weight] = state, contents, multiplied
    return found[2]


def forget(weight: Tensor) -> None:
    """Drop what is kept of a weight, which is trained now."""
    with _lock:
        _kept.pop(weight, None)
