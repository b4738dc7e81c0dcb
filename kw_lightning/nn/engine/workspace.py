"""How much memory the engine may use at once for the kernels of single samples, and how batches are cut to fit."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Of 0.6 to 40 MiB, 5 to 20 were equally fast, and under 2.5 slower, with a last-level cache of 32 MiB.
CPU_BYTES = 6 * 2**20
# On a GPU, chunks only bound memory, so they are few: at least so many bytes, or one part in so many of its memory.
GPU_BYTES = 256 * 2**20
GPU_SHARE = 32
# Larger buffers are freed after use.
KEPT_BYTES = 64 * 2**20
# Huge pages are requested for new memory of this size or more.
HUGE_BYTES = 4 * 2**20
# Rows of α that a mixing product should have: 9 rows reach 50 GFLOP/s, 36 rows 100, 144 rows 135.
MIXING_ROWS = 128
# Cutting a cell into fewer rows than this gains nothing.
CELL_ROWS = 16

_bytes: int | None = None


def workspace_bytes(device: torch.device) -> int:
    """Return the bound on the bytes of per-sample kernels that exist at once in one layer."""
    if _bytes is not None:
        return _bytes
    return CPU_BYTES if device.type == "cpu" else _gpu_bytes(device)


@functools.lru_cache(maxsize=64)
def _gpu_bytes(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return GPU_BYTES
    return max(GPU_BYTES, int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE)


class _Scratch(threading.local):
    """Memory of the calling thread, kept from one layer to the next."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return uninitialised memory of the type and device of `like`, valid until the next call with the same purpose.

    On the CPU it is the same memory every time: new memory costs a page fault every 4 KiB, which at 2 GB/s takes longer
    than the work on it. A GPU's allocator reuses memory by itself.
    """
    size = math.prod(shape)
    return flat_scratch(purpose, size, like)[:size].view(tuple(shape))


def flat_scratch(purpose: str, size: int, like: Tensor) -> Tensor:
    """Return such memory for at least `size` numbers, flat: for callers that need only its address."""
    if like.device.type != "cpu" or size * like.element_size() > KEPT_BYTES:
        return in_huge_pages(like.new_empty(size))
    key = purpose, like.dtype
    buffer = _scratch.buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # it outlives the call, and no training could write to it
            buffer = _scratch.buffers[key] = torch.empty(size, dtype=like.dtype, device="cpu")
    return buffer


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return the tensor, new and not yet written to, after requesting huge pages for it where the system has them.

    Memory of over 32 MiB, such as a large warehouse's gradient, is new to the process at every step; with a page fault
    every 4 KiB, zeroing it takes four times as long.
    """
    size = tensor.numel() * tensor.element_size()
    advise = _advise_huge()
    if size < HUGE_BYTES or tensor.device.type != "cpu" or advise is None:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(start, tensor.data_ptr() + size - start)
    return tensor


@functools.cache
def _advise_huge() -> Callable[[int, int], int] | None:
    """Return a function that requests huge pages for (address, bytes), None where there are none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):  # no POSIX system
        return None
    if advice is None:
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return lambda start, size: int(madvise(start, size, advice))


@contextmanager
def workspace(limit: int | None) -> Iterator[None]:
    """Within the context, bound the bytes of per-sample kernels; None is the default for the device.

    However low the bound, a path that needs a sample's whole kernel gets it.
    """
    global _bytes
    if limit is not None and limit < 1:
        raise ValueError(f"a workspace has at least 1 byte: found {limit}")
    before, _bytes = _bytes, limit
    try:
        yield
    finally:
        _bytes = before


def sample_chunks(batch: int, sample_bytes: int, device: torch.device) -> list[slice]:
    """Cut a batch into chunks of samples that keep within the workspace, equal but for the last."""
    most = max(1, workspace_bytes(device) // max(sample_bytes, 1))
    count = max(1, math.ceil(batch / most))
    size = math.ceil(batch / count)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, max(size, 1))]


def kernel_chunks(
    batch: int, mixtures: int, rows: int, row_bytes: int, device: torch.device
) -> tuple[list[slice], list[slice]]:
    """Cut a layer's per-sample kernels into chunks of samples and of the cells' rows that keep within the workspace.

    Args:
        batch: samples.
        mixtures: of a sample's kernel.
        rows: of a cell, co.
        row_bytes: of one row of one mixture.

    Returns:
        (chunks of samples, chunks of rows).
    """
    limit = workspace_bytes(device)
    wanted = min(batch, math.ceil(MIXING_ROWS / mixtures))
    step = rows
    while step > CELL_ROWS and step % 2 == 0 and wanted * mixtures * step * row_bytes > limit:
        step //= 2
    samples = sample_chunks(batch, mixtures * step * row_bytes, device)
    return samples, [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
