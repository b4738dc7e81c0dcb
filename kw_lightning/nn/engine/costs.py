"""What a path costs on a CPU: its work, counted from shapes alone, times calibrated seconds per unit of work.

The seconds per unit are fitted (non-negative least squares on relative errors) to the times of every path on 105 dense
convolutions: of ResNet18 and 50, MobileNetV2 and ConvNeXt, maps of 56² to 1², batches of 1 to 64, budgets 1/4 to 4; two
cores with AVX2, float32. The fit misses a time by a tenth in the median and by a third in the worst tenth; of 210
choices 208 were within 1.25 times of the fastest path, the others, on maps of 3² and 7², 1.3 and 1.5 times as slow.
recipes/studies/engine_costs.py repeats it. For GPUs see `roofline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.engine.workspace import kernel_chunks, sample_chunks
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


# Numbers that a compiled pass takes side by side, where vectors are narrowest.
LANES = 16

# Seconds per unit of `Work`, by path and pass.
SECONDS: dict[str, tuple[Work, Work]] = {
    "fused": (Work(3.4e-11, 3.7e-11, 5.6e-10, 0, 0.00024), Work(1e-10, 6.9e-11, 1.6e-09, 0, 0.00042)),
    "winograd": (Work(3.6e-11, 5.2e-11, 4e-10, 0, 0.00061), Work(1.1e-10, 8e-11, 1.7e-09, 0, 0)),
    "fused_inputs": (Work(1.2e-10, 3.4e-11, 5.9e-10, 0, 0), Work(3.2e-10, 6.6e-11, 1.9e-09, 0, 0)),
    "products": (Work(5.2e-11, 3.8e-11, 3.7e-10, 0.00012, 0.00041), Work(1.4e-10, 7.2e-11, 8.6e-11, 0.00022, 0.00081)),
    "per_sample": (
        Work(5.7e-11, 3.7e-11, 1.4e-09, 0.00012, 0.00032),
        Work(1.3e-10, 7.3e-11, 3.2e-09, 0.00024, 0.00061),
    ),
    "grouped": (Work(5.8e-11, 3.1e-11, 1.4e-09, 0.00034, 0), Work(1.3e-10, 6.5e-11, 3.5e-09, 0.00056, 0)),
    "mix_inputs": (Work(0, 4.3e-11, 0, 1.9e-05, 0.0011), Work(2.4e-10, 7.4e-11, 0, 0, 0.0022)),
    "mix_outputs": (Work(8.6e-11, 3.6e-11, 0, 9.8e-06, 0.00074), Work(4e-11, 1.1e-10, 0, 5e-05, 0.00099)),
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
    if path in ("fused", "winograd", "fused_inputs"):
        return _count_compiled(path, convolution, batch, size, cells)
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
        chunks = len(sample_chunks(batch, cells * outputs * ci * itemsize, device))
        work = out_groups * mixed * co * _narrow(ci, co)
        return Work(mixed * mixtures, work, maps * live + mixed * out_groups, chunks * (out_groups * cells + live))
    mixed = batch * cells * inputs * co
    chunks = len(sample_chunks(batch, cells * inputs * co * itemsize, device))
    work = in_groups * mixed * ci * _narrow(ci, co)
    return Work(mixed * mixtures, work, maps * live + mixed * in_groups, chunks * (in_groups * cells + live))


def _count_compiled(path: str, convolution: Convolution, batch: int, size: Shape, cells: int) -> Work:
    """Count the work of a compiled pass: cells of few channels leave lanes of its vectors empty."""
    _, out_groups, in_groups = convolution.grid
    co, ci = convolution.cell_shape[:2]
    cell = -(-co // LANES) * LANES * ci
    taps = find_taps(convolution, size)
    outputs = math.prod(taps.output_size)
    maps = batch * (ci * in_groups * math.prod(size) + co * out_groups * outputs)
    packed = cells * cell
    if path == "fused_inputs":
        mixed = batch * out_groups * outputs * ci * cells
        return Work(mixed * in_groups * len(taps.taps), mixed * cell / ci, maps + packed, 0)
    kernels = batch * out_groups * in_groups * cell
    if path == "winograd":
        positions = 4 ** len(size)
        tiles = math.prod(-(-n // 2) for n in taps.output_size)
        return Work(
            kernels * positions * cells, kernels * positions * tiles, maps * positions / 2 ** len(size) + packed, 0
        )
    read = sum(math.prod(t.stop - t.start for t in tap.target) for tap in taps.taps)
    return Work(kernels * len(taps.taps) * cells, kernels * read, maps + packed, 0)


def seconds(work: Work, path: str, *, backward: bool) -> float:
    """Return the time that a pass should take."""
    unit = SECONDS[path][backward]
    return sum(getattr(work, field.name) * getattr(unit, field.name) for field in fields(Work))


def _narrow(*sides: float) -> float:
    """Return how much longer products with narrow operands take than their multiply-adds say."""
    return math.prod(1 + 16 / side for side in sides)
