"""Multiply-adds of a dynamic layer for one sample.

Counted: the attention's linear layers, and the mixing of cells with the convolution or matrix product itself, in the
cheapest order that the engine may take (`kw_lightning.nn.engine.work`). A warehouse that is not dynamic mixes once a
step, whatever the batch, which is no work of a sample. Not counted, as for the static network: norms, activations,
pooling, biases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from kw_lightning.nn.attention import attention_width, basis_shape, factors_width
from kw_lightning.nn.engine import Convolution, work
from kw_lightning.nn.partition import LayerPartition
from kw_lightning.nn.weighing import Function, columns
from kw_lightning.planning.geometry import gated_channels
from kw_lightning.planning.network import calls
from kw_lightning.planning.tracing import Trace, batch_first, positions
from kw_lightning.planning.types import Count, LayerPlan, WarehousePlan
from kw_lightning.recipe.types import Warehouse


def static_macs(kernel_shape: tuple[int, ...], positions: int) -> int:
    """Return the multiply-adds of a static layer with an output of so many positions."""
    return math.prod(kernel_shape) * positions


def attention_macs(
    in_channels: int,
    partition: LayerPartition,
    reduction: Fraction,
    basis: Fraction | None = None,
    function: Function = "contrast",
    gated_channels: int = 0,
) -> int:
    """Return the multiply-adds of a layer's attention, its gates' linear layers included."""
    width = attention_width(in_channels, reduction)
    m, n = partition.mixtures, partition.cells
    numbers = columns(n, function)
    if basis is None:
        return width * (in_channels + gated_channels + m * numbers)
    own, rank = basis_shape(partition, basis)
    return width * (in_channels + gated_channels + m * (own + rank + numbers - n)) + m * rank * (n - own)


def layer_macs(layer: LayerPlan, warehouse: Warehouse, forward: Trace, engine: str = "auto") -> Count | None:
    """Return the multiply-adds of a layer as it was and as it will be; None where the forward pass is not known."""
    if forward.failure is not None:
        return None
    static = kw = 0
    partition, attention, batch = layer.partition, warehouse.attention, warehouse.batch_dim or 0
    convolution = Convolution(partition.kernel_shape, partition.cell_shape, groups=layer.layer.groups)
    gated = gated_channels(attention, layer.choice)
    form = (attention.reduction, attention.basis, attention.function, gated)
    attending = attention_macs(layer.layer.in_channels, partition, *form)
    width = factors_width(layer.layer.in_channels, attention.reduction, attention.basis, attention.function)
    for call in calls(layer.layer, forward):
        shapes = [batch_first(shape, batch) for shape in (call.inputs, call.outputs)]
        inputs, outputs = (positions(partition.kernel_shape, shape) for shape in shapes)
        # Windowed networks fold windows into the batch, so that one sample is several to the layer.
        samples = shapes[0][0]
        static += samples * static_macs(partition.kernel_shape, outputs)
        if warehouse.dynamic:
            mixing = work.forward(engine, convolution, partition.cells, inputs, outputs, batch=samples, width=width)
            kw += samples * attending + mixing
    kw = kw if warehouse.dynamic else static
    return Count(static if layer.layer.part is None else 0, kw)  # an adapter takes no layer's place


def total_macs(warehouses: Sequence[WarehousePlan], forward: Trace) -> Count | None:
    """Return the multiply-adds of the network as it was and as it will be; None where they are not known."""
    if forward.macs is None:
        return None
    layers = [layer.macs for warehouse in warehouses for layer in warehouse.layers if layer.macs is not None]
    return Count(forward.macs, forward.macs + sum(macs.kw - macs.static for macs in layers))
