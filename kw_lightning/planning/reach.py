"""How far a warehouse reaches, where `stages.sharing` says it: the whole network, a stage, a block, or one layer.

Paper: KernelWarehouse (ICML 2024), section 3.2; its ablation narrows the sharing from stages to layers.

What is asked for is kept as it is: no group is divided, and no layer is left out, however large its attention grows.
`stages: auto` divides, see `sharing.py`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kw_lightning.planning.network import Layer
from kw_lightning.recipe.types import Reach

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Group:
    """Layers that a warehouse may serve together.

    Attributes:
        size: their feature maps' size, or the number of tokens; of several sizes the first.
        layers: in module order.
        name: None for stages, which are numbered.
    """

    size: tuple[int, ...]
    layers: list[Layer]
    name: str | None = None


def regrouped(stages: Sequence[Group], reach: Reach, model: nn.Module) -> list[Group]:
    """Return the layers of all stages in groups of another reach, in module order."""
    if reach == "stage":
        return list(stages)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    placed = sorted(
        ((layer, stage.size) for stage in stages for layer in stage.layers), key=lambda pair: order[pair[0].name]
    )
    block_of = _blocks(model, [layer for layer, _ in placed]) if reach == "block" else {}
    groups: dict[str, Group] = {}
    for layer, size in placed:
        key = "network" if reach == "network" else block_of.get(layer.name, layer.name)
        if key not in groups:
            groups[key] = Group(size, [], _unique(_warehouse_name(key, reach), groups.values()))
        groups[key].layers.append(layer)
    return list(groups.values())


def _blocks(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the block of each layer that is in one, by name.

    A block is a module around several of the layers: the innermost that stands in a container, as the repeated units
    of a network do, or else the outermost that is no mere stage. So a whole block of GhostNet shares a warehouse, not
    each of its halves.
    """
    modules = dict(model.named_modules())
    several = modules_around_several(model, layers)
    found: dict[str, str] = {}
    for layer in layers:
        around = [name for name in ancestors(layer.name) if name in several]
        repeated = [name for name in around if isinstance(modules[_outer(name)], CONTAINERS)]
        if around:
            found[layer.name] = repeated[0] if repeated else _outermost(around, modules, several, layers)
    return found


def _outermost(
    around: Sequence[str], modules: Mapping[str, nn.Module], several: set[str], layers: Sequence[Layer]
) -> str:
    """Return the outermost module around a layer that is no stage: whose layers are not all in modules of one class.

    Args:
        around: the modules around the layer, the innermost first.
        modules: of the network, by name.
        several: names of those with at least two of the layers.
        layers: of all blocks.
    """
    block = around[-1]
    for outer, inner in itertools.pairwise(reversed(around)):
        parts = {name for name in several if _outer(name) == outer}
        within = [set(ancestors(layer.name)) for layer in layers if layer.name.startswith(f"{outer}.")]
        if len({type(modules[name]) for name in parts}) > 1 or any(names.isdisjoint(parts) for names in within):
            break
        if len(parts) > 1:
            block = inner
    return block


def _outer(name: str) -> str:
    return name.rpartition(".")[0]


def modules_around_several(model: nn.Module, layers: Iterable[Layer]) -> set[str]:
    """Return the names of the modules, no mere containers, with at least two of the layers."""
    counts = Counter(outer for layer in layers for outer in ancestors(layer.name))
    return {name for name, module in model.named_modules() if counts[name] > 1 and not isinstance(module, CONTAINERS)}


def ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules around a layer, the innermost first, without the network itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _warehouse_name(name: str, reach: Reach) -> str:
    """Return a module's name as one that a warehouse may have."""
    written = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return written if re.match(r"[A-Za-z_]", written) else f"{reach}-{written}".rstrip("-")


def _unique(name: str, groups: Iterable[Group]) -> str:
    taken = {group.name for group in groups}
    number, found = 2, name
    while found in taken:
        number, found = number + 1, f"{name}-{number}"
    return found


__all__ = ["Group", "ancestors", "modules_around_several", "regrouped"]
