"""Stages found from the network itself: what `stages: auto` and `kw new` write for one.

As the paper does for ResNets (section 3.2 and the published layouts): the convolutions of one feature-map size share a
warehouse. With the handover, the layers that lead from one stage into the next, those of its first block that read the
block's input, belong to the stage before. The stem and the classifier stay static, and so does what is handed over to
the stem.

Beyond ResNets: depthwise and grouped convolutions have warehouses of their own. Where the channels of a stage have so
small a common divisor that its attention would outgrow its cells, layers that widen and layers that narrow are kept
apart, then layers of different width, then runs of layers. Layers on pooled features (squeeze and excitation) stay
static. Linear layers over positions or tokens that change the width (the MLP layers of ConvNeXt and of vision
transformers) and the value third of fused `qkv` projections are grouped by the number of tokens, apart from
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from kw_lightning.errors import KWError, Problem, mistake
from kw_lightning.nn.partition import PartitionError, common_cell_shape, mixture_count
from kw_lightning.planning.network import Layer, Network, survey
from kw_lightning.planning.selection import matcher, select
from kw_lightning.planning.tracing import Call, Trace, trace
from kw_lightning.recipe.types import Recipe, Selector, Warehouse

# An attention has mixtures × cells columns: past this the layers of a stage are better split.
SPLIT_ABOVE = 256
VALUE_THIRD = (Fraction(2, 3), Fraction(1))


@dataclass(frozen=True)
class Stage:
    """Layers of a network that go together in a warehouse.

    Attributes:
        name: as `stage1` or `stage1-depthwise`.
        layers: names in module order; the value third of a fused projection as `blocks.0.attn.qkv[2/3:]`.
        size: the feature map's size, or the number of tokens.
    """

    name: str
    layers: tuple[str, ...]
    size: tuple[int, ...]


def find_stages(model: nn.Module, input_shape: Sequence[int], *, handover: bool = True) -> tuple[Stage, ...]:
    """Return the stages of a network, in module order.

    Args:
        model: the network, on any device; on the meta device too.
        input_shape: [channels, *size] of one sample.
        handover: give the layers that lead into a stage to the stage before.

    Raises:
        KWError: a network that does not run on one input of this shape.
    """
    forward = trace(model, input_shape)
    if forward.failure is not None:
        raise KWError(f"no stages to be found: {forward.failure}")
    return _stages(survey(model, forward), model, forward, handover, taken=())


def stage_warehouses(
    recipe: Recipe, network: Network, model: nn.Module, forward: Trace
) -> tuple[list[Warehouse], list[Problem]]:
    """Return the warehouses of `stages: auto`, of the layers that no other warehouse of the recipe takes."""
    stages = recipe.stages
    assert stages is not None
    if forward.failure is not None:
        hint = "" if recipe.model is not None and recipe.model.input is not None else "; give it by model.input"
        return [], [recipe.document.problem("stages", f"no stages to be found: {forward.failure}{hint}")]
    chosen, _ = select(network, recipe.warehouses, recipe.document)
    taken = {choice.layer.name for choices in chosen.values() for choice in choices}
    problems = []
    for index, pattern in enumerate(stages.exclude):
        matches = matcher(pattern)
        excluded = {layer.name for layer in network.layers if any(map(matches, layer.names))}
        if not excluded:
            names = [layer.name for layer in network.layers]
            message = mistake(pattern, "names and globs of layers of the network", names=names)
            problems.append(recipe.document.problem(f"stages.exclude[{index}]", message))
        taken |= excluded
    known = {warehouse.name for warehouse in recipe.warehouses}
    found = []
    for stage in _stages(network, model, forward, stages.handover, taken):
        name = stage.name if stage.name not in known else f"auto-{stage.name}"
        selectors = tuple(
            Selector(
                name=layer.removesuffix("[2/3:]"),
                part=VALUE_THIRD if layer.endswith("[2/3:]") else None,
                path="stages",
            )
            for layer in stage.layers
        )
        found.append(Warehouse(name, selectors, stages.budget, stages.cell, stages.attention, "stages"))
    if not found and not problems:
        problems.append(recipe.document.problem("stages", "no stages to be found: the network has no blocks of layers"))
    return found, problems


@dataclass
class _Group:
    """The layers of one feature-map size, the stem's first."""

    size: tuple[int, ...]
    layers: list[Layer]


def _stages(
    network: Network, model: nn.Module, forward: Trace, handover: bool, taken: Iterable[str]
) -> tuple[Stage, ...]:
    groups = _convolution_groups(network, model, forward, handover)
    for tokens in _token_groups(network, forward):
        beside = next((group for group in groups if group.size == tokens.size), None)
        if beside is None:
            groups.append(tokens)
        else:
            beside.layers += tokens.layers
    left_out = set(taken)
    stages = []
    for number, group in enumerate(groups, start=1):
        layers = [layer for layer in group.layers if layer.name not in left_out]
        for suffix, members in _kinds(layers):
            names = tuple(_written(layer) for layer in members)
            stages.append(Stage(f"stage{number}{suffix}", names, group.size))
    return tuple(stages)


def _convolution_groups(network: Network, model: nn.Module, forward: Trace, handover: bool) -> list[_Group]:
    convolutions = [
        layer
        for layer in network.layers
        if layer.type != "Linear" and layer.refusal is None and math.prod(_call(forward, layer).outputs[2:]) > 1
    ]
    blocks = _Blocks(model, convolutions, forward)
    stem: list[Layer] = []
    groups: list[_Group] = []
    opening = ""
    for layer in convolutions:
        block = blocks.of(layer)
        # The stem: what stands before the first block; of a network without blocks its first convolution.
        if not groups and (not stem or (not block and blocks.any)):
            stem.append(layer)
            continue
        call = _call(forward, layer)
        size = (forward.calls[block][0] if block else call).outputs[2:]
        if not groups or groups[-1].size != size:
            groups.append(_Group(size, []))
            opening = block
        leads = bool(block) and block == opening and _leads(forward.calls[block][0], call)
        target = groups[-1].layers
        if handover and leads:
            target = groups[-2].layers if len(groups) > 1 else stem
        target.append(layer)
    return groups


def _leads(block: Call, layer: Call) -> bool:
    """Return whether a layer reads its block's input and the block changes its shape."""
    return layer.input_id == block.input_id and block.inputs[1:] != block.outputs[1:]


class _Blocks:
    """The block of a layer: its innermost module, no mere container, with at least two convolutions."""

    def __init__(self, model: nn.Module, convolutions: Sequence[Layer], forward: Trace) -> None:
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        counts: dict[str, int] = {}
        for layer in convolutions:
            for name in _ancestors(layer.name):
                counts[name] = counts.get(name, 0) + 1
        self._names = {
            name
            for name, module in model.named_modules()
            if name and counts.get(name, 0) > 1 and not isinstance(module, containers) and name in forward.calls
        }
        self.any = bool(self._names)

    def of(self, layer: Layer) -> str:
        return next((name for name in _ancestors(layer.name) if name in self._names), "")


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _token_groups(network: Network, forward: Trace) -> list[_Group]:
    groups: list[_Group] = []
    for layer in network.layers:
        call = _call(forward, layer)
        # One sample must be one row of the batch: layers on windows would mix a kernel for every window.
        if layer.type != "Linear" or layer.refusal or len(call.inputs) < 3 or call.inputs[0] != 1:
            continue
        if layer.in_channels == layer.out_channels or (
            layer.out_channels == 3 * layer.in_channels and not _is_fused(layer)
        ):
            continue
        size = call.outputs[1:-1]
        if not groups or groups[-1].size != size:
            groups.append(_Group(size, []))
        groups[-1].layers.append(layer)
    return groups


def _kinds(layers: Sequence[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """Split the layers of one feature-map size into those that share well; yields (suffix of the name, layers)."""
    linear = [layer for layer in layers if layer.type == "Linear"]
    dense = [layer for layer in layers if layer.groups == 1 and layer.type != "Linear"]
    kinds = {"": dense}
    if _mixtures(dense) > SPLIT_ABOVE:
        kinds = {
            "-widen": [layer for layer in dense if layer.out_channels > layer.in_channels],
            "-narrow": [layer for layer in dense if layer.out_channels <= layer.in_channels],
        }
    kinds["-depthwise"] = [layer for layer in layers if layer.groups > 1 and layer.kernel_shape[1] == 1]
    kinds["-grouped"] = [layer for layer in layers if layer.groups > 1 and layer.kernel_shape[1] > 1]
    kinds["-linear" if len(linear) < len(layers) else ""] = linear
    for suffix, members in kinds.items():
        if _mixtures(members) <= SPLIT_ABOVE:
            widths = {0: members}
        else:
            widths = {}
            for layer in members:
                widths.setdefault(min(layer.in_channels, layer.out_channels), []).append(layer)
        for width, alike in widths.items():
            for number, found in enumerate(_runs(alike)):
                yield f"{suffix}{width or ''}{f'-{number + 1}' if number else ''}", found


def _runs(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Cut layers into runs that are small enough to share a warehouse."""
    run: list[Layer] = []
    for layer in layers:
        if run and _mixtures([*run, layer]) > SPLIT_ABOVE:
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def _mixtures(layers: Sequence[Layer]) -> int:
    shapes = [
        (layer.kernel_shape[0] // 3, *layer.kernel_shape[1:]) if _is_fused(layer) else layer.kernel_shape
        for layer in layers
    ]
    try:
        cell_shape = common_cell_shape(shapes)
    except PartitionError:
        return 0
    return sum(mixture_count(shape, cell_shape) for shape in shapes)


def _is_fused(layer: Layer) -> bool:
    return layer.type == "Linear" and layer.name.rpartition(".")[2] == "qkv" and layer.kernel_shape[0] % 3 == 0


def _written(layer: Layer) -> str:
    return f"{layer.name}[2/3:]" if _is_fused(layer) else layer.name


def _call(forward: Trace, layer: Layer) -> Call:
    calls = forward.calls_of(layer.names)
    return calls[0] if calls else Call((), (), 0)


__all__ = ["Stage", "find_stages", "stage_warehouses"]
