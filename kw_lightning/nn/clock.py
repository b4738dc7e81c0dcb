"""The clock by which paths are chosen and benchmarks are measured: one for both, so that they mean the same time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
