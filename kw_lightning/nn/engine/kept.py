"""Mixed bases that are kept in evaluation, while the weights that they are made of stand still.

They are looked up by the attention's last weight, and gone with it. Before they are used, all that they are made of is
compared with what it was: which tensors, their versions, and, since `parameter.data.copy_` changes no version, their
products with a fixed vector. That reads the weights once, which is little beside reading the bases.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.native import Kept

KEPT_BYTES = 2**30
"""Of all mixed bases of a process together, where no other bound is set."""

Use = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class _Entry:
    state: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    size: int
    bases: Kept = field(default_factory=Kept)


@dataclass(frozen=True)
class _Settings:
    use: Use = "auto"
    limit: int = KEPT_BYTES


_settings = _Settings()
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


@contextmanager
def bases(use: Use = "auto", keep: int | None = None) -> Iterator[None]:
    """Within the context, say when kernels are mixed along the attention's rank, and how much is kept of it.

    Args:
        use: "auto" where it should be faster, "always" wherever an attention has factors, "never".
        keep: bytes of mixed bases that are kept in evaluation, of all layers together, 0 for none; None means 1 GiB.

    Raises:
        ValueError: another use, **or** a negative number of bytes.
    """
    global _settings
    if use not in ("auto", "always", "never"):
        raise ValueError(f'mixing along the rank is "auto", "always" or "never": found "{use}"')
    if keep is not None and keep < 0:
        raise ValueError(f"kept bases have 0 bytes or more: found {keep}")
    before, _settings = _settings, _Settings(use, KEPT_BYTES if keep is None else keep)
    try:
        yield
    finally:
        _settings = before


def use() -> Use:
    """Return when kernels are mixed along the rank."""
    return _settings.use


def kept_bytes() -> int:
    """Return the bytes of all mixed bases that are kept."""
    with _lock:
        return sum(entry.size for entry in _entries.values())


def may_keep(factors: AttentionFactors, cells: Tensor) -> bool:
    """Return whether the mixed bases of an attention and cells may be kept.

    They may in evaluation, of single precision on a CPU, where there is room: those of other layers do not make room.
    """
    if not factors.lasting or cells.dtype != torch.float32 or cells.device.type != "cpu":
        return False
    with _lock:
        others = sum(entry.size for weight, entry in _entries.items() if weight is not factors.weight)
    return others + _size(factors, cells) <= _settings.limit


def keep(factors: AttentionFactors, cells: Tensor, geometry: tuple[Any, ...]) -> Kept:
    """Return the mixed bases of an attention and cells, not filled yet where there are none or they are others'.

    Args:
        geometry: all that they depend on beside the tensors.
    """
    tensors = factors.weight, factors.bias, cells
    state = (*geometry, float(factors.temperature), *(_place(tensor) for tensor in tensors))
    contents = factors.bias.clone(), _touch(factors.weight), _touch(cells)
    with _lock:
        entry = _entries.get(factors.weight)
        if entry is None or entry.state != state or not all(map(torch.equal, entry.tensors, contents)):
            entry = _entries[factors.weight] = _Entry(state, contents, _size(factors, cells))
        found: Kept = entry.bases
        return found


def _size(factors: AttentionFactors, cells: Tensor) -> int:
    """Return the bytes of the mixed bases, but for what their blocks are padded by."""
    return 4 * factors.mixtures * (factors.hidden.shape[1] + 2) * math.prod(cells.shape[1:])


def forget(factors: AttentionFactors) -> None:
    """Drop the mixed bases of an attention, which is trained now."""
    if len(_entries):
        with _lock:
            _entries.pop(factors.weight, None)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype


def _touch(tensor: Tensor) -> Tensor:
    """Return the products of a tensor's rows with a fixed vector."""
    rows = tensor.flatten(1)
    return torch.mv(rows, _probe(rows.shape[1], rows.dtype))


@functools.lru_cache(maxsize=64)
def _probe(length: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(length)
        return torch.randn(length, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
