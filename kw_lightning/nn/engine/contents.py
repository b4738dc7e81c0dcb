"""Whether tensors are what they were when something was made of them that is kept.

PyTorch counts changes in place, but not those that go through `parameter.data`, as averaged weights often do. So
numbers are compared too. Those of small tensors at every call; of cells, which may be hundreds of megabytes that all
layers of a warehouse read, a few at every call, and all of them as soon as a layer comes that has relied on the last
reading before: once in a pass of a network.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kw_lightning.nn.engine.native import row_products

SMALL = 2**18
"""Numbers that are all read at every call."""
STEP = 4099
"""Of more numbers, every so many-th is: a prime, so that lines and columns of all cells are met in turn."""


@dataclass(frozen=True)
class _Reading:
    """All numbers of a tensor as they were read, and by whom that has been relied on."""

    place: tuple[Any, ...]
    some: Tensor
    contents: Tensor
    readers: set[int] = field(default_factory=set)


_readings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Return which tensor it is and how often it was changed in place, as far as it counts that."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype


def contents_of(tensor: Tensor, reader: Tensor | None = None) -> Tensor:
    """Return what tells a tensor's numbers from others: the products of its rows with a fixed vector.

    Args:
        tensor: [rows, ...], contiguous.
        reader: stands for who asks, where others ask for the same tensor; a change of few numbers through
            `tensor.data` is then seen by a reader's second call after it at the latest, and by the next pass of a
            network. None reads all numbers.
    """
    if reader is None or tensor.numel() <= SMALL:
        return _read(tensor)
    owner = tensor if tensor._base is None else tensor._base
    at, some = place(tensor), tensor.flatten()[::STEP].clone()
    with _lock:
        found: _Reading | None = _readings.get(owner)
        if found is None or found.place != at or id(reader) in found.readers or not torch.equal(found.some, some):
            found = _readings[owner] = _Reading(at, some, _read(tensor))
        found.readers.add(id(reader))
        return found.contents


def _read(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(1)
    return row_products(rows, _probe(rows.shape[1], rows.dtype))


@functools.lru_cache(maxsize=64)
def _probe(length: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(length)
        return torch.randn(length, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
