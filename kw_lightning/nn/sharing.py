"""Giving several layers one warehouse."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from kw_lightning.errors import kind, sentence
from kw_lightning.nn.attention import Norm
from kw_lightning.nn.gates import Side
from kw_lightning.nn.layer import KWLayer
from kw_lightning.nn.partition import Ratio, Spatial, Start, WarehousePartition, partition
from kw_lightning.nn.warehouse import CellStart, Warehouse
from kw_lightning.nn.weighing import Function, SoftmaxAnnealing


def share_warehouse(
    layers: Sequence[KWLayer],
    *,
    name: str = "warehouse",
    budget: Ratio = 1,
    cells: int | None = None,
    out_ratio: Ratio = 1,
    in_ratio: Ratio = 1,
    spatial: Spatial = "split",
    reduction: Fraction | float = Fraction(1, 16),
    norm: Norm = "batch",
    basis: Fraction | float | None = None,
    start: Start = "own",
    function: Function = "contrast",
    softmax_annealing: SoftmaxAnnealing | None = None,
    gates: Sequence[Side] = (),
    dynamic: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Warehouse:
    """Make one warehouse for the layers, in the order given, and their attentions.

    Args:
        layers: layers without a warehouse, in the network's order.
        name: the warehouse's name.
        budget, cells, out_ratio, in_ratio, spatial, start: see `kw_lightning.nn.partition.partition`.
        reduction, norm, basis: see `kw_lightning.nn.attention.ContrastingAttention`; they say nothing to a warehouse
            that is not dynamic.
        function: see `kw_lightning.nn.weighing.CellWeights`.
        softmax_annealing: how the temperature of `function="softmax"` falls; None where it stays 1.
        gates: which channels of the layers have gates, see `kw_lightning.nn.gates.ChannelGates`.
        dynamic: whether every sample has kernels of its own. Else the weights of the cells are learnt as they are, and
            a layer mixes one kernel a step.
        device, dtype: of cells and attention.

    Raises:
        PartitionError: kernels that cannot share a warehouse.
        ValueError: a layer that has a warehouse already, stands in the list twice, **or** another `norm` or `function`.
        TypeError: a layer that is not dynamic.
    """
    static = next((layer for layer in layers if not isinstance(layer, KWLayer)), None)
    if static is not None:
        raise TypeError(sentence(f"{kind(static)} in the place of a layer", "dynamic layers, as KWConv2d"))
    if len(set(layers)) < len(layers):
        raise ValueError("a layer stands twice in the list of layers that share a warehouse")
    geometry = partition(
        [layer.kernel_shape for layer in layers],
        budget,
        cells=cells,
        out_ratio=out_ratio,
        in_ratio=in_ratio,
        spatial=spatial,
        start=start,
    )
    form: dict[str, Any] = {"start": start, "function": function, "dynamic": dynamic}
    if dynamic:
        form |= {"reduction": reduction, "norm": norm, "basis": basis, "gates": gates}
    return attach_warehouse(
        layers, geometry, name=name, softmax_annealing=softmax_annealing, device=device, dtype=dtype, **form
    )


def attach_warehouse(
    layers: Sequence[KWLayer],
    geometry: WarehousePartition,
    *,
    name: str,
    softmax_annealing: SoftmaxAnnealing | None = None,
    cell_start: CellStart = "kernels",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **attention: Any,
) -> Warehouse:
    """Make one warehouse of a geometry that is worked out already, and the layers' attentions.

    Args:
        layers: layers without a warehouse, in the network's order.
        geometry: of these layers, see `kw_lightning.nn.partition.partition`.
        name, softmax_annealing, device, dtype: see `share_warehouse`.
        cell_start: how the cells are drawn, see `Warehouse.reset_parameters`.
        **attention: `start`, `function`, `dynamic` and, of a dynamic warehouse, `reduction`, `norm`, `basis` and
            `gates`; see `share_warehouse`.

    Raises:
        ValueError: a layer that has a warehouse already, **or** another `norm` or `function`.
    """
    for layer in layers:
        if layer.warehouse is not None:
            raise ValueError(f'a layer draws on one warehouse: it has "{layer.warehouse.name}" already')
    warehouse = Warehouse(
        name, geometry, start=cell_start, softmax_annealing=softmax_annealing, device=device, dtype=dtype
    )
    for index, (layer, share) in enumerate(zip(layers, geometry.layers, strict=True)):
        layer.attach(warehouse, share, owner=index == 0, **attention)
    return warehouse
