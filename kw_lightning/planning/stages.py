"""Stages found from the network itself: what `stages: auto` and `kw new` write for one.

As the paper does for ResNets (section 3.2 and the published layouts): the convolutions of one feature-map size share a
warehouse. With the handover, the layers that lead from one stage into the next, those of its first block that read the
block's input, belong to the stage before. The stem and the classifier stay static, and so does what is handed over to
the stem.

Beyond ResNets: depthwise and grouped convolutions have warehouses of their own. Where the channels of a stage have so
small a common divisor that its attention would outgrow its cells, the stage is divided, and layers for which nothing
helps stay static: see `sharing.py`. Layers on pooled features (squeeze and excitation) stay static. Linear layers over
positions or tokens that change the width (the MLP layers of ConvNeXt and of vision transformers) and the value third of
fused `qkv` projections are grouped by the number of tokens, apart from convolutions.

With `stages.sharing` warehouses reach as far as it says, and nothing is divided or left out: see `reach.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from torch import nn

from kw_lightning.errors import KWError, Problem, mistake, times
from kw_lightning.planning.network import ALLOWED, Layer, Network, survey
from kw_lightning.planning.reach import Group, ancestors, modules_around_several, regrouped
from kw_lightning.planning.selection import Choice, matcher, select
from kw_lightning.planning.sharing import Share, least_attention, share
from kw_lightning.planning.tracing import Call, Trace, trace
from kw_lightning.recipe.types import Attention, Cell, Recipe, Selector, Stages, Warehouse

VALUE_THIRD = (Fraction(2, 3), Fraction(1))


@dataclass(frozen=True)
class Stage:
    """Layers of a network that go together in a warehouse.

    Attributes:
        name: as `stage1` or `stage1-depthwise`.
        layers: names in module order; the value third of a fused projection as `blocks.0.attn.qkv[2/3:]`.
        size: the feature map's size, or the number of tokens.
        cell, attention: how its warehouse is made.
    """

    name: str
    layers: tuple[str, ...]
    size: tuple[int, ...]
    cell: Cell
    attention: Attention


class Found(NamedTuple):
    """What `stages: auto` makes of a network: its warehouses, and why some layers have none, by name."""

    warehouses: list[Warehouse]
    static: Mapping[str, str]
    problems: list[Problem]


def find_stages(model: nn.Module, input_shape: Sequence[int], *, handover: bool = True) -> tuple[Stage, ...]:
    """Return the stages of a network, in module order.

    Args:
        model: the network, on any device; on the meta device too.
        input_shape: [channels, *size] of one sample.
        handover: give the layers that lead into a stage to the stage before.

    Raises:
        KWError: a network that does not run on one input of this shape, **or** one without stages.
    """
    forward = trace(model, input_shape)
    network = survey(model, forward)
    if not forward.calls:
        raise KWError(f"no stages to be found: {forward.failure}")
    stages, static = _stages(network, model, forward, Stages(handover=handover), taken=())
    if not stages:
        raise KWError(f"no stages to be found: {_why_none(network, forward, static)}")
    return stages


def stage_warehouses(recipe: Recipe, network: Network, model: nn.Module, forward: Trace) -> Found:
    """Return the warehouses of `stages: auto`, of the layers that no other warehouse of the recipe takes."""
    stages = recipe.stages
    assert stages is not None
    if not forward.calls:
        hint = "" if recipe.model is not None and recipe.model.input is not None else "; give it by model.input"
        problem = recipe.document.problem("stages", f"no stages to be found: {forward.failure}{hint}")
        return Found([], {}, [problem])
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
    made, static = _stages(network, model, forward, stages, taken)
    for stage in made:
        name = stage.name if stage.name not in known else f"auto-{stage.name}"
        selectors = tuple(
            Selector(
                name=layer.removesuffix("[2/3:]"),
                part=VALUE_THIRD if layer.endswith("[2/3:]") else None,
                path="stages",
            )
            for layer in stage.layers
        )
        found.append(
            Warehouse(
                name,
                selectors,
                stages.budget,
                stage.cell,
                stage.attention,
                path="stages",
                dynamic=stages.dynamic,
                adapter=stages.adapter,
            )
        )
    if not found and not problems:
        message = f"no stages to be found: {_why_none(network, forward, static)}"
        problems.append(recipe.document.problem("stages", message))
    return Found(found, static, problems)


def _why_none(network: Network, forward: Trace, static: Mapping[str, str]) -> str:
    """Return why no layer of a network belongs to a stage: the reasons of all its layers, the most frequent first."""
    reasons: Counter[str] = Counter()
    for layer in network.layers:
        call = _call(forward, layer)
        if layer.refusal is not None:
            reason = layer.refusal
        elif layer.name in static:
            reason = "an attention would have more parameters than the layer itself"
        elif not call.inputs:
            reason = "the forward pass does not call it"
        elif layer.type == "Linear":
            reason = "a linear layer that serves no positions or tokens, or keeps their width"
        else:
            reason = "it stands before the first block, or has one position only"
        reasons[reason] += 1
    others = Counter(kind for kind in network.modules.values() if kind.startswith("ConvTranspose"))
    reasons.update({f"{kind} is no {ALLOWED}": count for kind, count in others.items()})
    if not reasons:
        return f"the network has no {ALLOWED}"
    counted = (f"{count} of {reasons.total()} layers: {reason}" for reason, count in reasons.most_common(3))
    return f"no layer is left for one ({'; '.join(counted)})"


def _stages(
    network: Network, model: nn.Module, forward: Trace, wanted: Stages, taken: Iterable[str]
) -> tuple[tuple[Stage, ...], dict[str, str]]:
    """Return the stages, and why layers that could belong to one do not, by name."""
    reach = wanted.sharing or "stage"
    groups = _convolution_groups(network, model, forward, wanted.handover and reach == "stage")
    for tokens in _token_groups(network, forward):
        beside = next((group for group in groups if group.size == tokens.size), None)
        if beside is None:
            groups.append(tokens)
        else:
            beside.layers += tokens.layers
    groups = regrouped(groups, reach, model)
    left_out = set(taken)
    stages: list[Stage] = []
    static: dict[str, str] = {}
    number = 0
    for group in groups:
        shares, alone = _shares([layer for layer in group.layers if layer.name not in left_out], wanted)
        for choice in alone:
            static[choice.layer.name] = _why_static(choice, wanted)
        number += bool(shares)
        for found in shares:
            names = tuple(_written(choice.layer) for choice in found.choices)
            name = f"{group.name or f'stage{number}'}{found.suffix}"
            stages.append(Stage(name, names, group.size, found.cell, found.attention))
    return tuple(stages), static


def _why_static(choice: Choice, wanted: Stages) -> str:
    attention = least_attention(choice, wanted.cell, wanted.attention)
    if attention is None:
        return f"no cell of the shares that stages.cell asks for divides its kernel, {times(choice.kernel_shape)}"
    return f"its attention would outweigh it: {attention:,} parameters beside {math.prod(choice.kernel_shape):,}"


def _convolution_groups(network: Network, model: nn.Module, forward: Trace, handover: bool) -> list[Group]:
    convolutions = [
        layer
        for layer in network.layers
        if layer.type != "Linear" and layer.refusal is None and math.prod(_call(forward, layer).outputs[2:]) > 1
    ]
    # A layer's block is the innermost module around several: whether the layer reads its input says where it belongs.
    # What shares a warehouse with `sharing: block` is a wider unit of some networks, see `reach.py`.
    blocks = {name for name in modules_around_several(model, convolutions) if name in forward.calls}
    stem: list[Layer] = []
    groups: list[Group] = []
    opening = ""
    for layer in convolutions:
        block = next((name for name in ancestors(layer.name) if name in blocks), "")
        # The stem: what stands before the first block; of a network without blocks its first convolution.
        if not groups and (not stem or (not block and blocks)):
            stem.append(layer)
            continue
        call = _call(forward, layer)
        size = (forward.calls[block][0] if block else call).outputs[2:]
        if not groups or groups[-1].size != size:
            groups.append(Group(size, []))
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


def _token_groups(network: Network, forward: Trace) -> list[Group]:
    groups: dict[tuple[int, ...], Group] = {}
    for layer in network.layers:
        call = _call(forward, layer)
        # One sample must be one row of the batch: layers on windows would mix a kernel for every window.
        if layer.type != "Linear" or layer.refusal or len(call.inputs) < 3 or call.inputs[0] != 1:
            continue
        if layer.in_channels == layer.out_channels or (
            layer.out_channels == 3 * layer.in_channels and not _is_fused(layer)
        ):
            continue
        # Mixers work on tokens and on channels in turn: one group for each, however often they take turns.
        size = call.outputs[1:-1]
        groups.setdefault(size, Group(size, [])).layers.append(layer)
    return list(groups.values())


def _shares(layers: Sequence[Layer], wanted: Stages) -> tuple[list[Share], list[Choice]]:
    """Return the warehouses of the layers of one group, kinds apart, and the layers left static."""
    kinds: dict[str, list[Choice]] = {"": [], "-depthwise": [], "-grouped": [], "-linear": []}
    for layer in layers:
        kinds[_kind(layer)].append(Choice(layer, _value_rows(layer)))
    if len(kinds["-linear"]) == len(layers) or wanted.sharing == "layer":
        kinds = {"": [choice for choices in kinds.values() for choice in choices]}
    if wanted.split == "kernel_size":
        kinds = {kind + size: found for kind, choices in kinds.items() for size, found in _sizes_apart(choices)}
    if wanted.sharing is not None:
        found = [
            Share(tuple(choices), wanted.cell, wanted.attention, kind) for kind, choices in kinds.items() if choices
        ]
        return found, []
    shares: list[Share] = []
    static: list[Choice] = []
    for kind, choices in kinds.items():
        found, left = share(choices, wanted.cell, wanted.attention)
        shares += [replace(part, suffix=kind + part.suffix) for part in found]
        static += left
    return shares, static


def _sizes_apart(choices: Sequence[Choice]) -> list[tuple[str, list[Choice]]]:
    """Return layers by the size of their kernels, with what that adds to a name: nothing where all are of one."""
    sizes: dict[tuple[int, ...], list[Choice]] = {}
    for choice in choices:
        sizes.setdefault(choice.layer.kernel_size, []).append(choice)
    if len(sizes) == 1:
        return [("", list(choices))]
    return [(f"-{'x'.join(map(str, size))}".rstrip("-"), found) for size, found in sizes.items()]


def _kind(layer: Layer) -> str:
    if layer.type == "Linear":
        return "-linear"
    if layer.groups == 1:
        return ""
    return "-depthwise" if layer.kernel_shape[1] == 1 else "-grouped"


def _value_rows(layer: Layer) -> tuple[int, int] | None:
    """Return the rows of a fused projection that become dynamic; None means all."""
    return (layer.out_channels * 2 // 3, layer.out_channels) if _is_fused(layer) else None


def _is_fused(layer: Layer) -> bool:
    return layer.type == "Linear" and layer.name.rpartition(".")[2] == "qkv" and layer.kernel_shape[0] % 3 == 0


def _written(layer: Layer) -> str:
    return f"{layer.name}[2/3:]" if _is_fused(layer) else layer.name


def _call(forward: Trace, layer: Layer) -> Call:
    calls = forward.calls_of(layer.names)
    return calls[0] if calls else Call((), (), 0)


__all__ = ["Stage", "find_stages", "stage_warehouses"]
