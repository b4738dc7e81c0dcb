"""Multiply-adds of a dynamic layer for one sample.

Counted: the attention's linear layers, the mixing of cells, and the convolution or matrix product itself. Not counted,
as for the static network: norms, activations, pooling, biases.

The mixing is counted in the cheapest of three orders that give the same output:

- kernels: assemble the sample's kernel out of n cells (m·n·|cell|), then convolve with it;
- outputs: convolve the input's groups of channels with all n cells, then mix the results by α;
- inputs: mix the input's groups of channels by α for every cell, then convolve with the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from kw_lightning.nn.attention import attention_width, basis_shape
from kw_lightning.nn.partition import LayerPartition
from kw_lightning.planning.tracing import Trace, batch_first, positions
from kw_lightning.planning.types import Count, LayerPlan, WarehousePlan
from kw_lightning.recipe.types import Warehouse


def static_macs(kernel_shape: tuple[int, ...], positions: int) -> int:
    """Return the multiply-adds of a static layer with an output of so many positions."""
    return math.prod(kernel_shape) * positions


def attention_macs(
    in_channels: int, partition: LayerPartition, reduction: Fraction, basis: Fraction | None = None
) -> int:
    """Return the multiply-adds of a layer's attention."""
    width = attention_width(in_channels, reduction)
    m, n = partition.mixtures, partition.cells
    if basis is None:
        return in_channels * width + width * m * (n + 1)
    own, rank = basis_shape(partition, basis)
    return in_channels * width + width * m * (own + rank + 1) + m * rank * (n - own)


def mixing_macs(partition: LayerPartition, groups: int, inputs: int, outputs: int) -> int:
    """Return the multiply-adds of mixing and convolving, in the cheapest order.

    Args:
        partition: the layer's share of its warehouse.
        groups: of the convolution.
        inputs, outputs: positions of the layer's input and output; 1 each for a vector.
    """
    cell_out, cell_in, *cell_size = partition.cell_shape
    cell = math.prod(partition.cell_shape)
    m, n = partition.mixtures, partition.cells
    _, out_groups, in_groups = partition.grid
    kernels = m * n * cell + static_macs(partition.kernel_shape, outputs)
    # Cells of one position are convolved where the input lies and mixed where the output lies; whole ones, that move
    # over the input by themselves, the other way round.
    split = math.prod(cell_size) == 1
    results = n * cell * in_groups * (inputs if split else outputs) + m * n * cell_out * outputs
    mixed = m * n * cell_in * (outputs if split else inputs) + n * cell * out_groups * outputs
    # With several groups an output group of cells may straddle two of them: only the first order is counted then.
    return kernels if groups > 1 else min(kernels, results, mixed)


def layer_macs(layer: LayerPlan, warehouse: Warehouse, forward: Trace) -> Count | None:
    """Return the multiply-adds of a layer as it was and as it will be; None where the forward pass is not known."""
    if forward.failure is not None:
        return None
    static = kw = 0
    partition, attention, batch = layer.partition, warehouse.attention, warehouse.batch_dim or 0
    attending = attention_macs(layer.layer.in_channels, partition, attention.reduction, attention.basis)
    for call in forward.calls_of(layer.layer.names):
        shapes = [batch_first(shape, batch) for shape in (call.inputs, call.outputs)]
        inputs, outputs = (positions(partition.kernel_shape, shape) for shape in shapes)
        # Windowed networks fold windows into the batch, so that one sample is several to the layer.
        samples = shapes[0][0]
        static += samples * static_macs(partition.kernel_shape, outputs)
        kw += samples * (attending + mixing_macs(partition, layer.layer.groups, inputs, outputs))
    return Count(static, kw)


def total_macs(warehouses: Sequence[WarehousePlan], forward: Trace) -> Count | None:
    """Return the multiply-adds of the network as it was and as it will be; None where they are not known."""
    if forward.macs is None:
        return None
    layers = [layer.macs for warehouse in warehouses for layer in warehouse.layers if layer.macs is not None]
    return Count(forward.macs, forward.macs + sum(macs.kw - macs.static for macs in layers))
