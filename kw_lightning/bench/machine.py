"""The machine that figures were measured on."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kw_lightning.bench.timing import best_seconds

GEMM_SIDE = 2048


@dataclass(frozen=True)
class Machine:
    """What a figure depends on.

    Attributes:
        processor: its name, of the GPU where that computes.
        threads: that one operator may use on the CPU.
        torch: version.
        gemm: GFLOP/s of a large matrix product in the measured type: what could be reached at best.
    """

    processor: str
    threads: int
    torch: str
    gemm: float

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, torch {self.torch}, "
            f"{self.gemm:.0f} GFLOP/s in a {GEMM_SIDE}³ matrix product"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return asdict(self)


def describe_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Describe the machine and measure a large matrix product on it."""
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device, dtype=dtype) for _ in range(2))
    seconds = best_seconds(lambda: torch.mm(a, b), device, repeats=7)
    return Machine(_processor(device), torch.get_num_threads(), torch.__version__, 2 * GEMM_SIDE**3 / seconds / 1e9)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability})"
