"""Which path computes a convolution: by counted work and calibrated speeds, or by timing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kw_lightning.errors import sentence
from kw_lightning.nn.engine import autotune, costs, paths, roofline
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.partition import Shape

ENGINES = ("auto", "autotune", "mix_kernels", "mix_outputs", "mix_inputs", "reference")
# The paths of an engine that is one order of contraction; the others choose among all.
_ORDERS = {
    "mix_kernels": ("fused", "winograd", "depthwise", "products", "per_sample", "grouped"),
    "mix_outputs": ("mix_outputs", "joint_outputs"),
    "mix_inputs": ("fused_inputs", "mix_inputs", "joint_inputs"),
}
# Two forms of the same order: a product for each cell, or copies and one product, where launches cost more than copies.
_FOR_CPUS, _FOR_GPUS = {"mix_inputs", "mix_outputs"}, {"joint_inputs", "joint_outputs"}
# A device for which no path is compiled: what cannot compute there for its geometry's sake can nowhere.
_ANYWHERE = torch.device("meta")


def refusal(engine: str, convolution: Convolution) -> str | None:
    """Return why an engine can compute a convolution nowhere, None where it can."""
    reasons = [paths.refusal(p, convolution, torch.float32, _ANYWHERE) for p in _ORDERS.get(engine, paths.PATHS)]
    return None if None in reasons else reasons[-1]


def check_engine(engine: str, convolution: Convolution) -> None:
    """Check that an engine can compute a convolution.

    Raises:
        ValueError: it cannot.
    """
    reason = refusal(engine, convolution)
    if reason is not None:
        raise ValueError(_sentence(engine, convolution, reason))


def able(engine: str, convolution: Convolution, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return the paths of an engine that can compute a convolution in a type and on a device.

    Args:
        engine: one of `ENGINES`, **or** a path that has not an engine's name.

    Raises:
        ValueError: none can.
    """
    others = _FOR_GPUS if device.type == "cpu" else _FOR_CPUS
    named = [path for path in _ORDERS.get(engine, paths.PATHS) if path not in others] if engine in ENGINES else [engine]
    reasons = {path: paths.refusal(path, convolution, dtype, device) for path in named}
    found = [path for path, reason in reasons.items() if reason is None]
    if not found:
        raise ValueError(_sentence(engine, convolution, [*reasons.values()][-1]))
    return found


def _sentence(engine: str, convolution: Convolution, reason: str | None) -> str:
    found = (
        f'engine "{engine}" for a convolution of kernel {list(convolution.kernel_shape)} in {convolution.groups} '
        f"groups with cells {list(convolution.cell_shape)} ({reason})"
    )
    return sentence(found, ", ".join(engine for engine in ENGINES if refusal(engine, convolution) is None))


def choose(
    x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, engine: str, *, backward: bool
) -> str:
    """Return the path for a pass.

    The same shapes always get the same path, unless `engine` is "autotune".

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`, **or** a path that has not an engine's name.
        backward: choose for the backward pass instead of the forward pass.

    Raises:
        ValueError: an engine that cannot compute the convolution.
    """
    if engine not in ENGINES or not x.numel():  # of nothing there is no work by which to rank
        return able(engine, convolution, x.dtype, x.device)[0]
    ranked = rank(convolution, x.shape[0], tuple(x.shape[2:]), len(cells), x.dtype, x.device, engine, backward)
    if engine == "autotune" and len(ranked) > 1:
        return autotune.fastest(ranked, x, attention, cells, convolution, backward=backward)
    return ranked[0]


@functools.lru_cache(maxsize=4096)
def rank(
    convolution: Convolution,
    batch: int,
    size: Shape,
    cells: int,
    dtype: torch.dtype,
    device: torch.device,
    engine: str,
    backward: bool,
) -> tuple[str, ...]:
    """Return the paths of an engine that can compute the convolution, the one that should be fastest first.

    Raises:
        ValueError: none of them can.
    """
    found = able(engine, convolution, dtype, device)
    if convolution.groups > 1:  # this order was the fastest on every such layer measured
        return tuple(path for path in ("depthwise", "grouped", "per_sample") if path in found)

    def cost(path: str) -> float:
        if device.type != "cpu":
            return roofline.seconds(path, convolution, batch, size, cells, dtype, device)
        work = costs.count_work(path, convolution, batch, size, cells, dtype.itemsize, device)
        return costs.seconds(work, path, backward=backward)

    return tuple(sorted(found, key=cost))
