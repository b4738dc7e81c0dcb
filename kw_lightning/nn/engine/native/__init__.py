"""The engine in C, for single precision on a CPU: kernels that are mixed in the cache and never see the memory."""

from __future__ import annotations

from kw_lightning.nn.engine.native.calls import (
    DEPTHWISE,
    MIX_INPUTS,
    MIX_KERNELS,
    WINOGRAD,
    Form,
    available,
    backward,
    forward,
)
from kw_lightning.nn.engine.native.library import LibraryError, Status, find_compiler, status
from kw_lightning.nn.engine.native.positions import allows_winograd

__all__ = [
    "DEPTHWISE",
    "MIX_INPUTS",
    "MIX_KERNELS",
    "WINOGRAD",
    "Form",
    "LibraryError",
    "Status",
    "allows_winograd",
    "available",
    "backward",
    "find_compiler",
    "forward",
    "status",
]
