"""What stands in a network: its convolutions and linear layers by name, and which of them can be made dynamic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from kw_lightning.errors import KWError
from kw_lightning.nn import KWLayer
from kw_lightning.planning.tracing import Call, Shape, Trace

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVERTIBLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
KINDS = tuple(kind.__name__ for kind in CONVERTIBLE)
ALLOWED = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"


class Reading(NamedTuple):
    """How a convolution reads its input, a number per spatial dimension.

    Attributes:
        stride, dilation: of the convolution.
        padding: with zeros, by the convolution itself.
        padded_before: positions that the layer puts around its input first, both sides together: where the sides are
            unequal, or not of zeros.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padded_before: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Which half of an adapter a layer is, "down" or "up", and the layer that it stands beside."""

    frozen: Layer
    name: str


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer of a network.

    Attributes:
        name: as `named_modules()` prints it; the root's is "".
        aliases: other names of the very same module.
        type: "Conv1d", "Conv2d", "Conv3d" or "Linear".
        kernel_shape: [out_channels, in_channels / groups, *kernel_size]; of a linear layer [out, in].
        in_channels: channels of the input, all groups together.
        groups: of the convolution; 1 for a linear layer.
        parameters: numbers in weight and bias.
        refusal: why the layer cannot be made dynamic; None when it can.
        beside: of a linear layer, the nearest module that works on [sequence, batch, channels] by its `batch_first`;
            None where there is none.
        reading: of a convolution; None for a linear layer.
        part: of an adapter's layer, which is not in the network yet; None for all others.
    """

    name: str
    aliases: tuple[str, ...]
    type: str
    kernel_shape: tuple[int, ...]
    in_channels: int
    groups: int
    parameters: int
    refusal: str | None = None
    beside: str | None = None
    reading: Reading | None = None
    part: Part | None = None

    @property
    def stands(self) -> Layer:
        """Return the layer that stands in the network as it is: itself, or the one that it is an adapter of."""
        return self if self.part is None else self.part.frozen

    @property
    def out_channels(self) -> int:
        """Return the number of output channels."""
        return self.kernel_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Return the kernel's spatial size; of a linear layer ()."""
        return self.kernel_shape[2:]

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name of the layer, the first one first."""
        return (self.name, *self.aliases)


class Network(NamedTuple):
    """The layers of a network in module order, and the class name of every module by name."""

    layers: tuple[Layer, ...]
    modules: Mapping[str, str]


def survey(model: nn.Module, forward: Trace | None = None) -> Network:
    """Return the convolutions and linear layers of a network, in module order.

    Subclasses count as layers too, but only those that leave the forward pass as it is can be made dynamic.

    Args:
        model: the network.
        forward: its forward pass, if it is known: a layer with whose weight the network computes cannot be dynamic.
    """
    names: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = module
        names.setdefault(id(module), []).append(name)
    owners = _weight_owners(modules)
    attention_parts = _parts_of_attention(modules)
    orders = {name: module.batch_first for name, module in modules.items() if hasattr(module, "batch_first")}
    layers = []
    for first, module in _distinct(modules):
        if not isinstance(module, CONVERTIBLE):
            continue
        refusal = _refusal(module)
        if refusal is None and id(module) in attention_parts:
            refusal = "nn.MultiheadAttention reads its weight directly instead of calling it"
        if refusal is None and len(owners[id(module.weight)]) > 1:
            other = next(owner for owner in owners[id(module.weight)] if owner != first)
            refusal = f'shares its weight with "{other}", and a warehouse can only tie cells'
        if refusal is None and forward is not None:
            refusal = reading(names[id(module)], forward)
        layer = _layer(first, names[id(module)], module, refusal)
        layers.append(replace(layer, beside=_sequence_first(first, orders)) if layer.type == "Linear" else layer)
    return Network(tuple(layers), {name: type(module).__name__ for name, module in modules.items()})


def reading(names: Sequence[str], forward: Trace) -> str | None:
    """Return how a network computes with the weight of the layer that has these names; None where it does not."""
    if forward.reads.isdisjoint(names):
        return None
    return f"the network reads its weight {'beside' if forward.calls_of(names) else 'instead of'} calling it"


def calls(layer: Layer, forward: Trace) -> tuple[Call, ...]:
    """Return the calls of a layer; of half an adapter, which is not there yet, the calls that it will have."""
    found = forward.calls_of(layer.stands.names)
    if layer.part is None:
        return found
    channels = -1 if layer.type == "Linear" else 1
    rank = layer.out_channels if layer.part.name == "down" else layer.in_channels
    between = [_with_size(call.outputs, channels, rank) for call in found]
    if layer.part.name == "down":
        return tuple(replace(call, outputs=shape) for call, shape in zip(found, between, strict=True))
    return tuple(replace(call, inputs=shape) for call, shape in zip(found, between, strict=True))


def _with_size(shape: Shape, dimension: int, size: int) -> Shape:
    sizes = list(shape)
    sizes[dimension] = size
    return tuple(sizes)


def refuse_dynamic(model: nn.Module) -> None:
    """Refuse a network that has dynamic layers.

    Raises:
        KWError: it has.
    """
    already = [name or type(model).__name__ for name, module in model.named_modules() if isinstance(module, KWLayer)]
    if already:
        others = f" and {len(already) - 1} other layers have" if len(already) > 1 else " has"
        raise KWError(
            f'the network is dynamic already: "{already[0]}"{others} a warehouse; '
            "convert a network once, from its static form"
        )


def _layer(first: str, names: list[str], module: nn.Module, refusal: str | None) -> Layer:
    kind = next(kind for kind in CONVERTIBLE if isinstance(module, kind))
    parameters = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    reading = None
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
        in_channels, groups = module.in_features, 1
    else:
        assert isinstance(module, Convolution)
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        in_channels, groups, reading = module.in_channels, module.groups, _reading(module)
    aliases = tuple(name for name in names if name != first)
    return Layer(first, aliases, kind.__name__, shape, in_channels, groups, parameters, refusal, reading=reading)


def _reading(module: Convolution) -> Reading:
    sides = module._reversed_padding_repeated_twice  # before and after, the last dimension first
    before, after = tuple(sides[-2::-2]), tuple(sides[::-2])
    none = (0,) * len(before)
    if before == after and module.padding_mode == "zeros":
        return Reading(module.stride, module.dilation, before, none)
    return Reading(module.stride, module.dilation, none, tuple(map(sum, zip(before, after, strict=True))))


def _refusal(module: nn.Module) -> str | None:
    kind = next(kind for kind in CONVERTIBLE if isinstance(module, kind))
    name = type(module).__name__
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return f"{name} has no shape before its first input"
    if hasattr(module, "parametrizations") or "weight" not in module._parameters:
        return f"{name} has a parametrized weight (torch.nn.utils), which a dynamic layer does not have"
    methods = ("forward", "_conv_forward", "__call__")
    if any(getattr(type(module), method, None) is not getattr(kind, method, None) for method in methods):
        return f"{name} is a {kind.__name__} with a forward pass of its own"
    weight = module._parameters["weight"]
    if weight is None or not weight.numel() or not weight.is_floating_point():
        return f"{name} has no weight of floating-point numbers"
    if isinstance(weight, DTensor):
        return f"{name} is sharded already: make the network dynamic before fully_shard or parallelize_module"
    return None


def _distinct(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _weight_owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in _distinct(modules):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _sequence_first(layer: str, orders: Mapping[str, Any]) -> str | None:
    """Return the first module with `batch_first=False` of the innermost block that has modules with that attribute."""
    block = layer
    while block:
        block = block.rpartition(".")[0]
        inside = {name: order for name, order in orders.items() if not block or name.startswith(f"{block}.")}
        if inside:
            return next(iter(inside)) if all(order is False for order in inside.values()) else None
    return None


def _parts_of_attention(modules: Mapping[str, nn.Module]) -> set[int]:
    attentions = [module for module in modules.values() if isinstance(module, nn.MultiheadAttention)]
    return {id(part) for attention in attentions for part in attention.modules()}
