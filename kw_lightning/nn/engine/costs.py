"""What a path costs: its work, counted from shapes alone, times calibrated seconds per unit of work.

The seconds per unit are fitted (non-negative least squares on relative errors) to the times of every path on 82 dense
convolutions: of ResNet18 and 50, MobileNetV2 and ConvNeXt, maps of 56² to 1², batches of 1 to 64, budgets 1/4 to 4; two
cores with AVX-512 that other work shared, float32. The fit misses a time by 15 % in the median and by 50 % in the worst
tenth. Those of "grouped" per element were raised by hand afterwards, and those per call and pass rounded. Other
machines, GPUs above all, are not calibrated: there `engine: autotune` measures instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.engine.workspace import kernel_chunks, map_chunks, sample_chunks
from kw_lightning.nn.partition import Shape


@dataclass(frozen=True)
class Work:
    """The work of one pass.

    Attributes:
        mixing: multiply-adds of the linear mixtures, weighted by `_narrow`.
        products: multiply-adds of the convolution or of the dense products, weighted by `_narrow`.
        elements: moved between maps, kernels and buffers outside of products.
        calls: of the library.
        passes: 1, for what every call of the path costs.
    """

    mixing: float
    products: float
    elements: float
    calls: float
    passes: float = 1.0


# Seconds per unit of `Work`, by path and pass.
SECONDS: dict[str, tuple[Work, Work]] = {
    "products": (Work(1.5e-11, 1.6e-11, 0, 2.4e-5, 5e-5), Work(6.0e-11, 2.8e-11, 0, 2.1e-5, 1e-4)),
    "per_sample": (Work(2.4e-11, 9.0e-12, 5.5e-10, 1.9e-5, 5e-5), Work(7.1e-11, 1.9e-11, 1.3e-9, 4.7e-5, 1e-4)),
    "grouped": (Work(2.5e-11, 9.8e-12, 6.5e-10, 0, 5e-5), Work(7.6e-11, 2.1e-11, 1.4e-9, 3.3e-5, 1e-4)),
    "mix_inputs": (Work(0, 1.6e-11, 0, 9.1e-6, 5e-5), Work(1.0e-10, 2.7e-11, 0, 0, 4.1e-4)),
    "mix_outputs": (Work(3.8e-11, 1.2e-11, 0, 2.4e-6, 3.7e-4), Work(4.5e-11, 3.8e-11, 0, 3.6e-5, 1e-4)),
}


def count_work(
    path: str, convolution: Convolution, batch: int, size: Shape, cells: int, itemsize: int, device: torch.device
) -> Work:
    """Count the forward work of a path; the backward pass does two or three times that.

    Args:
        path: see `paths.PATHS`.
        convolution: the geometry.
        batch: samples.
        size: of the input.
        cells: n.
        itemsize: bytes of a number.
    """
    _, out_groups, in_groups = convolution.grid
    co, ci, *cell_size = convolution.cell_shape
    out_channels, in_channels = convolution.kernel_shape[0], convolution.kernel_shape[1] * convolution.groups
    taps = find_taps(convolution, size)
    inputs, outputs = math.prod(size), math.prod(taps.output_size)
    mixtures = math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)
    cell = math.prod(convolution.cell_shape)
    maps = batch * (in_channels * inputs + out_channels * outputs)
    if path in ("grouped", "per_sample"):
        kernels = batch * mixtures * cell
        chunks = len(sample_chunks(batch, mixtures * cell * itemsize, device))
        calls = chunks if path == "grouped" else batch
        mixing = kernels * cells * _narrow(batch / chunks * mixtures)
        return Work(mixing, kernels * outputs, kernels + maps, calls + chunks)
    live = max(len(taps.taps), 1)
    phase = math.prod(-(-n // s) for n, s in zip(size, taps.stride, strict=True))
    if math.prod(cell_size) > 1:  # patches: a 1×1 convolution of wide pixels
        maps += batch * outputs * in_channels * live
        ci, live, inputs, phase = ci * math.prod(cell_size), 1, outputs, outputs
    mixtures = live * out_groups * in_groups
    if path == "products":
        row = max(ci, 0 if live == 1 else phase // in_groups) * itemsize
        samples, rows = kernel_chunks(batch, mixtures, co, row, device)
        moved = maps if live == 1 else maps + 2 * batch * phase * live * out_channels
        width = in_groups * ci if ci < 64 else ci
        return Work(
            batch * mixtures * cell * cells * _narrow(batch / len(samples) * mixtures),
            batch * mixtures * cell * phase * _narrow(width, phase),
            moved,
            len(samples) * len(rows) * (live + in_groups),
        )
    if path == "mix_inputs":
        mixed = batch * cells * outputs * ci
        chunks = len(map_chunks(batch, cells * outputs * ci * itemsize, device))
        work = out_groups * mixed * co * _narrow(ci, co)
        return Work(mixed * mixtures, work, maps * live + mixed * out_groups, chunks * (out_groups * cells + live))
    mixed = batch * cells * inputs * co
    chunks = len(map_chunks(batch, cells * inputs * co * itemsize, device))
    work = in_groups * mixed * ci * _narrow(ci, co)
    return Work(mixed * mixtures, work, maps * live + mixed * in_groups, chunks * (in_groups * cells + live))


def seconds(work: Work, path: str, *, backward: bool) -> float:
    """Return the time that a pass should take."""
    unit = SECONDS[path][backward]
    return sum(getattr(work, field.name) * getattr(unit, field.name) for field in fields(Work))


def _narrow(*sides: float) -> float:
    """Return how much longer products with narrow operands take than their multiply-adds say."""
    return math.prod(1 + 16 / side for side in sides)
