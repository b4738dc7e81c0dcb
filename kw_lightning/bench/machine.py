"""The machine that figures were measured on."""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kw_lightning.bench.timing import best_seconds
from kw_lightning.nn.engine import native

GEMM_SIDES = (256, 1024, 2048)
GEMM_SECONDS = 1.0  # most that one product may take: half precision is slow where no instructions know it


@dataclass(frozen=True)
class Machine:
    """What a figure depends on.

    Attributes:
        processor: its name, of the GPU where that computes.
        threads: that one operator may use on the CPU.
        torch: version.
        gemm: GFLOP/s of a large matrix product in the measured type: what could be reached at best.
        gemm_side: rows and columns of that product.
        compiled_passes: whether the compiled engine is in use, by which compiler, or why it is not.
    """

    processor: str
    threads: int
    torch: str
    gemm: float
    gemm_side: int
    compiled_passes: str

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, torch {self.torch}, "
            f"{self.gemm:.0f} GFLOP/s in a {self.gemm_side}³ matrix product, "
            f"compiled passes {self.compiled_passes}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return asdict(self)


def describe_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Describe the machine and measure a large matrix product on it."""
    side, seconds = GEMM_SIDES[0], 0.0
    for larger in GEMM_SIDES:
        if seconds * (larger / side) ** 3 > GEMM_SECONDS:
            break
        a, b = (torch.randn(larger, larger, device=device, dtype=dtype) for _ in range(2))
        work = functools.partial(torch.mm, a, b)
        side, seconds = larger, best_seconds(work, device, repeats=7 if larger == GEMM_SIDES[-1] else 3)
    gemm = 2 * side**3 / seconds / 1e9
    compiled = "not in use: they are for CPUs" if device.type != "cpu" else str(native.status())
    return Machine(processor(device), torch.get_num_threads(), torch.__version__, gemm, side, compiled)


def processor(device: torch.device) -> str:
    """Return the name of what computes on a device, with the instructions that torch uses on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
