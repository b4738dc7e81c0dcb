"""Tells whether tensors still have the values that they had when something that is kept was computed from them.

PyTorch counts changes in place, but not those made through `parameter.data`, as averaged weights often are. So values
are compared too: those of small tensors at every call. Cells may be hundreds of megabytes that all layers of a
warehouse read: a few of their values are compared at every call, and all of them as soon as a layer asks again that has
already relied on the last reading, which is once in a pass of a network.
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
"""Tensors of up to so many numbers are read whole at every call."""
STEP = 4099
"""Of larger tensors, every so many-th number is: a prime, so that all rows and columns of cells are sampled."""


@dataclass(frozen=True)
class _Reading:
    """A reading of all numbers of a tensor, and the readers that have relied on it."""

    place: tuple[Any, ...]
    some: Tensor
    contents: Tensor
    readers: set[int] = field(default_factory=set)


_readings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what identifies a tensor and its version, which inference tensors do not count."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype


def contents_of(tensor: Tensor, reader: Tensor | None = None) -> Tensor:
    """Return a fingerprint of a tensor's values: the products of its rows with a fixed vector.

    Args:
        tensor: [rows, ...], contiguous.
        reader: identifies the caller, where several ask for the same tensor. A change of few numbers through
            `tensor.data` is then seen at a reader's second call after it at the latest, and in the next pass of a
            network. None reads all numbers at every call.
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
