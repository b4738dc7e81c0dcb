"""Which path computes a convolution: by counted work and calibrated speeds, or by timing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kw_lightning.nn.engine import autotune, costs, paths, roofline
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.partition import Shape

ENGINES = ("auto", "autotune", "mix_kernels", "mix_outputs", "mix_inputs", "reference")
_CANDIDATES = {
    "mix_kernels": ("fused", "winograd", "depthwise", "products", "per_sample", "grouped"),
    "mix_outputs": ("mix_outputs", "joint_outputs"),
    "mix_inputs": ("fused_inputs", "mix_inputs", "joint_inputs"),
}
# Two forms of the same order: a product for each cell, or copies and one product, where launches cost more than copies.
_FOR_CPUS, _FOR_GPUS = {"mix_inputs", "mix_outputs"}, {"joint_inputs", "joint_outputs"}


def choose(
    x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, engine: str, *, backward: bool
) -> str:
    """Return the path for a pass.

    The same shapes always get the same path, unless `engine` is "autotune".

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`, **or** a path.
        backward: choose for the backward pass instead of the forward pass.
    """
    if engine in paths.PATHS:
        return engine
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

    Where an engine's order of contraction cannot (`paths.supports`), it is the one of "mix_kernels".
    """
    others = _FOR_GPUS if device.type == "cpu" else _FOR_CPUS
    named = [path for path in _CANDIDATES.get(engine, paths.PATHS) if path not in others]
    able = [path for path in named if paths.supports(path, convolution, dtype, device)]
    able = able or [path for path in _CANDIDATES["mix_kernels"] if paths.supports(path, convolution, dtype, device)]
    if convolution.groups > 1:  # this order was the fastest on every such layer measured
        return tuple(path for path in ("depthwise", "grouped", "per_sample") if path in able)

    def cost(path: str) -> float:
        if device.type != "cpu":
            return roofline.seconds(path, convolution, batch, size, cells, dtype, device)
        work = costs.count_work(path, convolution, batch, size, cells, dtype.itemsize, device)
        return costs.seconds(work, path, backward=backward)

    return tuple(sorted(able, key=cost))
