"""What is dynamic in a network, as plain data: to keep in a checkpoint and to compare with another network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kw_lightning.errors import times
from kw_lightning.nn import KWLayer, Warehouse
from kw_lightning.nn.partition import LayerPartition

Layout = dict[str, Any]


def dynamic_layers(network: nn.Module) -> dict[str, KWLayer]:
    """Return the dynamic layers of a network by name, in the network's order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, KWLayer)}


def layers_of_warehouses(network: nn.Module) -> list[tuple[Warehouse, dict[str, KWLayer]]]:
    """Return every warehouse of a network with its layers by name, in the network's order.

    A list, because two networks inside one LightningModule may each have a warehouse of the same name.
    """
    found: dict[int, tuple[Warehouse, dict[str, KWLayer]]] = {}
    for name, layer in dynamic_layers(network).items():
        warehouse = layer.given_warehouse
        if warehouse is not None:
            found.setdefault(id(warehouse), (warehouse, {}))[1][name] = layer
    return list(found.values())


def shares_of(layers: Mapping[str, KWLayer]) -> dict[str, LayerPartition]:
    """Return the share that each layer with attention has of its warehouse, by name."""
    found = {name: layer.partition for name, layer in layers.items() if layer.attention is not None}
    return {name: share for name, share in found.items() if share is not None}


def layout(network: nn.Module) -> Layout:
    """Return the warehouses of a network and where their layers draw from, as plain data."""
    found: Layout = {}
    for warehouse, layers in layers_of_warehouses(network):
        # From the partitions, because a sharded network's parameters have other shapes.
        shares = {name: layer.partition for name, layer in layers.items() if layer.partition is not None}
        first = next(iter(shares.values()))
        found[warehouse.name] = {
            "cells": [first.cells, *first.cell_shape],
            "layers": {
                name: {"kernel": list(share.kernel_shape), "first_cell": share.first_cell}
                for name, share in shares.items()
            },
        }
    return found


def differences(expected: Layout, found: Layout) -> list[str]:
    """Return in words what is not the same in two layouts: expected first, found second; nothing if they agree."""
    texts = [f'warehouse "{name}" is missing' for name in expected if name not in found]
    texts += [f'warehouse "{name}" is new' for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        first, second = expected[name], found[name]
        if first["cells"] != second["cells"]:
            texts.append(f'warehouse "{name}" has cells {times(first["cells"])}, here {times(second["cells"])}')
        one, two = first["layers"], second["layers"]
        texts += [f'layer "{layer}" of warehouse "{name}" is missing' for layer in one if layer not in two]
        texts += [f'layer "{layer}" of warehouse "{name}" is new' for layer in two if layer not in one]
        texts += [
            f'layer "{layer}" of warehouse "{name}" starts at cell {one[layer]["first_cell"]} with kernel '
            f"{times(one[layer]['kernel'])}, here {two[layer]['first_cell']} and {times(two[layer]['kernel'])}"
            for layer in one
            if layer in two and one[layer] != two[layer]
        ]
    return texts


def dynamic_misfits(network: nn.Module, weights: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return in words which dynamic layers of a network other weights are not for; nothing if they fit.

    Args:
        network: the network.
        weights: a state, in which the network's keys follow `prefix`.
        prefix: of the network's keys.
    """
    misfits = []
    for name, layer in dynamic_layers(network).items():
        cells = weights.get(f"{prefix}{name}.warehouse.cells")
        if f"{prefix}{name}.weight" in weights:
            misfits.append(f'"{name}" is static in the weights and dynamic here')
        elif isinstance(cells, Tensor) and layer.partition is not None:
            # From the partition, because a sharded network's parameters have other shapes.
            shape = [layer.partition.cells, *layer.partition.cell_shape]
            if list(cells.shape) != shape:
                misfits.append(f'"{name}.warehouse.cells" is {list(cells.shape)} in the weights and {shape} here')
    return misfits


def misfits(network: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Return in words why weights are not those of a network, its dynamic layers first; nothing if they fit."""
    found = dynamic_misfits(network, weights)
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            found.append(f'"{name}" is missing in the weights')
        elif not name.endswith(".warehouse.cells") and _shape(weights[name]) != _shape(tensor):
            found.append(f'"{name}" is {_shape(weights[name])} in the weights and {_shape(tensor)} here')
    return found + [f'"{name}" is in the weights and not here' for name in weights if name not in own]


def _shape(value: Any) -> list[int] | str:
    """Return a tensor's shape, or of another value, as a stranger's file may have it, its type."""
    return list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
