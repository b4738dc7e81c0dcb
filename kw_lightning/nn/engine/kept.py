"""Mixed bases that are kept in evaluation, as long as the weights that they are made of do not change.

They are looked up by the attention's last weight, and dropped with it. Before they are used, everything that they are
made of is compared with what it was: which tensors, their versions, and their values (contents.py).
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

from kw_lightning.nn.engine.contents import contents_of, place
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.memory import free_bytes
from kw_lightning.nn.engine.native import Kept

FREE_SHARE = 4
"""All mixed bases of a process may take one part in so many of the free memory, where no other bound is set."""
UNKNOWN_BYTES = 2**30
"""The bound where the system does not tell how much memory is free."""

Use = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class _Entry:
    state: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    size: int
    gain: float
    bases: Kept = field(default_factory=Kept)


@dataclass(frozen=True)
class _Settings:
    use: Use = "auto"
    limit: int | None = None


_settings = _Settings()
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


@contextmanager
def bases(use: Use = "auto", keep: int | None = None) -> Iterator[None]:
    """Within the context, set when kernels are mixed along the attention's rank, and how much memory is kept for it.

    Args:
        use: "auto" where it should be faster, "always" wherever an attention has factors, "never".
        keep: bytes of mixed bases that are kept in evaluation, of all layers together, 0 for none; None means a quarter
            of what is free when the process first keeps any.

    Raises:
        ValueError: another use, **or** a negative number of bytes.
    """
    global _settings
    if use not in ("auto", "always", "never"):
        raise ValueError(f'mixing along the rank is "auto", "always" or "never": found "{use}"')
    if keep is not None and keep < 0:
        raise ValueError(f"kept bases have 0 bytes or more: found {keep}")
    before, _settings = _settings, _Settings(use, keep)
    try:
        yield
    finally:
        _settings = before


def use() -> Use:
    """Return when kernels are mixed along the rank."""
    return _settings.use


def settings() -> Any:
    """Return what `bases` has set, an object that can be compared."""
    return _settings


def kept_bytes() -> int:
    """Return the bytes of all mixed bases that are kept."""
    with _lock:
        return sum(entry.size for entry in _entries.values())


def may_keep(factors: AttentionFactors, cells: Tensor) -> bool:
    """Return whether the mixed bases of an attention and cells may be kept.

    They may in evaluation, in single precision on a CPU, if there is room beside those of other layers that save as
    much per byte; those that save less make room.
    """
    if not factors.lasting or cells.dtype != torch.float32 or cells.device.type != "cpu":
        return False
    gain = _gain(factors, cells)
    with _lock:
        own = _entries.get(factors.weight)
        gain = gain if own is None else max(gain, own.gain)
        others = sum(
            entry.size for weight, entry in _entries.items() if weight is not factors.weight and entry.gain >= gain
        )
    return others + _size(factors, cells) <= _limit()


def keep(factors: AttentionFactors, cells: Tensor, geometry: tuple[Any, ...]) -> Kept:
    """Return the mixed bases of an attention and cells; not filled yet where none are kept, or their weights changed.

    Args:
        geometry: everything that they depend on beside the tensors.
    """
    tensors = factors.weight, factors.bias, cells
    state = (*geometry, float(factors.temperature), *(place(tensor) for tensor in tensors))
    contents = factors.bias.clone(), contents_of(factors.weight), contents_of(cells, factors.weight)
    with _lock:
        entry = _entries.get(factors.weight)
        if entry is None or entry.state != state or not all(map(torch.equal, entry.tensors, contents)):
            entry = _Entry(state, contents, _size(factors, cells), _gain(factors, cells))
            _entries[factors.weight] = entry
            _make_room(factors.weight)
        found: Kept = entry.bases
        return found


def forget(weight: Tensor) -> None:
    """Drop the mixed bases that are kept for an attention's last weight, which is now being trained."""
    if len(_entries):
        with _lock:
            _entries.pop(weight, None)


def _make_room(new: Tensor) -> None:
    """Drop what saves least per byte until the rest is within the bound again, but never what is new."""
    least = sorted(((weight, entry) for weight, entry in _entries.items()), key=lambda item: item[1].gain)
    held = sum(entry.size for _, entry in least)
    for weight, entry in least:
        if held > _limit() and weight is not new:
            del _entries[weight]
            held -= entry.size


def _limit() -> int:
    return _free_share() if _settings.limit is None else _settings.limit


@functools.cache
def _free_share() -> int:
    free = free_bytes()
    return UNKNOWN_BYTES if free is None else free // FREE_SHARE


def _gain(factors: AttentionFactors, cells: Tensor) -> float:
    """Return the multiply-adds that kept bases save in a call, per number kept, to rank layers by.

    For each such number, mixing from cells takes every sample cells / ranks multiply-adds; mixing from bases takes
    every sample one, and making the bases takes the batch n. Loading a number takes all layers the same.
    """
    batch, width = factors.hidden.shape
    ranks = width + 1
    return min(batch * len(cells) / ranks, batch + len(cells)) - batch


def _size(factors: AttentionFactors, cells: Tensor) -> int:
    """Return the bytes of the mixed bases, without the padding of their blocks."""
    return 4 * factors.mixtures * (factors.hidden.shape[1] + 2) * math.prod(cells.shape[1:])
