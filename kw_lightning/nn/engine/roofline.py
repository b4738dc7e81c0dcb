"""What a path costs on a GPU: from its multiply-adds, the memory it moves and its launches, by the machine's bounds.

A rough model, made without a measurement: half of the published bounds of an NVIDIA H100, and no fit. It is there so
that shapes get a sensible order of computation; `engine: autotune` measures instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.engine.workspace import kernel_chunks, sample_chunks
from kw_lightning.nn.partition import Shape

# Multiply-adds a second: tensor cores take types of two bytes.
HALF_PRECISION = 250e12
FULL_PRECISION = 16e12
BYTES = 1.7e12  # a second
LAUNCH = 8e-6  # seconds until the next operator runs, PyTorch's dispatch among them
GROUPED = 4.0  # how much longer a multiply-add takes in a convolution with groups


@dataclass(frozen=True)
class Load:
    """What one forward pass asks of the machine; backwards it is two to three times that.

    Attributes:
        multiply_adds: weighted by what they take in their kind of product.
        elements: read from memory or written to it.
        launches: of operators.
    """

    multiply_adds: float
    elements: float
    launches: float


def seconds(
    path: str, convolution: Convolution, batch: int, size: Shape, cells: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return about how long a forward pass takes.

    Args:
        path: "grouped", "per_sample", "products", "joint_inputs" or "joint_outputs".
        convolution: the geometry.
        batch: samples.
        size: of the input.
        cells: n.
        dtype: of the products.
        device: whose workspace bounds the chunks.
    """
    load = count(path, convolution, batch, size, cells, dtype, device)
    rate = HALF_PRECISION if dtype.itemsize < 4 else FULL_PRECISION
    return load.multiply_adds / rate + load.elements * dtype.itemsize / BYTES + load.launches * LAUNCH


def count(
    path: str, convolution: Convolution, batch: int, size: Shape, cells: int, dtype: torch.dtype, device: torch.device
) -> Load:
    """Count the load of a path, by its operators: every operand is read once and every result written once."""
    _, out_groups, in_groups = convolution.grid
    co, ci, *cell_size = convolution.cell_shape
    taps = find_taps(convolution, size)
    live, inputs, outputs = max(len(taps.taps), 1), math.prod(size), math.prod(taps.output_size)
    in_channels, out_channels = convolution.kernel_shape[1] * convolution.groups, convolution.kernel_shape[0]
    x, y = batch * in_channels * inputs, batch * out_channels * outputs
    stored = cells * math.prod(convolution.cell_shape)
    kernels = batch * math.prod(convolution.kernel_shape)
    cast = 2 * stored if dtype.itemsize < 4 else 0

    def chunks(elements: int) -> int:
        return len(sample_chunks(batch, elements // max(batch, 1) * dtype.itemsize, device))

    if path in ("grouped", "per_sample"):
        parts = chunks(kernels)
        calls = parts if path == "grouped" else batch
        slower = GROUPED if path == "grouped" or convolution.groups > 1 else 1.0
        # Kernels are mixed, laid out as the convolution takes them, and read by it; a map with its channels last is
        # copied to be folded, and results are copied into place.
        folded = 3 if path == "grouped" and batch > 1 else 1
        moved = cast + parts * stored + 4 * kernels + folded * x + 3 * y
        return Load(kernels * (cells + slower * outputs), moved, 2 + 2 * parts + 3 * calls)
    if math.prod(cell_size) > 1:  # patches of the input: a 1×1 convolution of wide pixels
        ci, live, inputs = ci * math.prod(cell_size), 1, outputs
        x += 2 * batch * outputs * ci * in_groups
    mixtures = live * out_groups * in_groups
    if path == "products":
        phase = outputs if live == 1 else math.prod(-(-n // s) for n, s in zip(size, taps.stride, strict=True))
        # What every tap gives is written, read, and added to the output, which is read and written as well.
        added = 0 if live == 1 else batch * phase * live * out_channels
        samples, rows = kernel_chunks(batch, mixtures, co, ci * dtype.itemsize, device)
        cut = len(samples) * len(rows)
        moved = cast + len(samples) * stored + 4 * kernels + x + y + 4 * added
        return Load(kernels * (cells + phase), moved, 4 + cut * (2 + in_groups + (live if added else 0)))
    if path == "joint_inputs":
        mixed, reads = batch * outputs * cells * ci, batch * outputs * live * in_channels
        weights = batch * outputs * cells * live * in_groups
        moved = cast + x + 3 * stored + 2 * reads + out_groups * (2 * mixed + 2 * weights) + 3 * y
        return Load(out_groups * mixed * (live * in_groups + co), moved, 4 + chunks(mixed) * (4 * out_groups + live))
    mixed, given = batch * inputs * cells * co, batch * inputs * live * out_channels
    weights = batch * inputs * cells * live * out_groups
    moved = cast + chunks(mixed) * stored + 2 * x + in_groups * (2 * mixed + 2 * weights) + 4 * given
    return Load(in_groups * mixed * (ci + live * out_groups), moved, 3 + chunks(mixed) * (4 * in_groups + live))
