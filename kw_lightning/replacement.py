"""What takes the place of one static layer: a dynamic one of the same geometry, or dynamic rows beside static ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from kw_lightning.nn.adapter import Adapted
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.nn.warehouse import Warehouse
from kw_lightning.nn.weighing import CellWeights

Static = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
Rows = tuple[int, int] | None

STATIC_CONVOLUTIONS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DYNAMIC_CONVOLUTIONS: tuple[type[Any], ...] = (KWConv1d, KWConv2d, KWConv3d)
# By these methods, which `timm.utils.reparameterize_model` calls, a module makes static layers of its weights.
FUSING = ("fuse", "reparameterize", "switch_to_deploy")


def dynamic_layer(static: Static, rows: Rows = None) -> KWLayer:
    """Return a dynamic layer with a static one's geometry and bias, still without a warehouse.

    Args:
        static: the layer.
        rows: which output channels (from, to); None means all, and then the bias is the very same parameter, so that
            an optimizer that has it keeps it.
    """
    layer: KWLayer = _like(static, rows, KWLinear, DYNAMIC_CONVOLUTIONS)
    bias: Any = static.bias if rows is None else _some(static.bias, rows)
    layer.bias = bias
    return layer


def adapter_half(frozen: Static, kernel_shape: Sequence[int], *, up: bool) -> KWLayer:
    """Return one half of an adapter beside a frozen layer, still without a warehouse, see `kw_lightning.nn.adapter`.

    Args:
        frozen: the layer.
        kernel_shape: of the half.
        up: whether it is the upper half, of kernel size 1; the lower one has the layer's geometry, without groups.
    """
    out_channels, in_channels = kernel_shape[:2]
    if isinstance(frozen, nn.Linear):
        return KWLinear(in_channels, out_channels, bias=False, device="meta")
    convolution = DYNAMIC_CONVOLUTIONS[len(kernel_shape) - 3]
    if up:
        return convolution(in_channels, out_channels, 1, bias=False, device="meta")  # type: ignore[no-any-return]
    moves = (frozen.kernel_size, frozen.stride, frozen.padding, frozen.dilation, 1, False, frozen.padding_mode)
    return convolution(in_channels, out_channels, *moves, device="meta")  # type: ignore[no-any-return]


def adapted(frozen: Static, down: KWLayer, up: KWLayer) -> Adapted:
    """Return a layer with an adapter; the layer's hooks move to the whole, so that they see the sum."""
    new = Adapted(frozen, down, up)
    for name, value in vars(frozen).items():
        if "_hooks" in name and value:
            new.__dict__[name], frozen.__dict__[name] = value, type(value)()
    new._is_full_backward_hook, frozen._is_full_backward_hook = frozen._is_full_backward_hook, None
    return new


def freeze_others(network: nn.Module, kept: Collection[int]) -> None:
    """Freeze all of a network but cells and attentions; norms that are frozen keep their running statistics.

    Args:
        network: the network, its adapters in place.
        kept: identities of other parameters that go on training.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, KWLayer)]
    method = {id(p) for layer in layers for p in layer.parameters() if p is not layer.bias}
    for parameter in network.parameters():
        if id(parameter) not in method:
            parameter.requires_grad_(id(parameter) in kept)
    own = {id(module) for layer in layers for module in layer.modules()}
    for module in network.modules():
        trains = id(module) in own or any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, _NormBase) and module.track_running_stats and not trains:
            module.eval()
            module.__dict__["train"] = partial(_stay, module)  # whatever the network is told


def replacement(static: Static, parts: Sequence[tuple[Rows, KWLayer]]) -> nn.Module:
    """Return what takes a layer's place, with its hooks and its training mode.

    Args:
        static: the layer.
        parts: one dynamic layer for all rows, or several with the rows of each, which do not overlap.
    """
    new: nn.Module
    if len(parts) == 1 and parts[0][0] is None:
        new = parts[0][1]
    else:
        pieces: list[nn.Module] = []
        end = 0
        for rows, dynamic in sorted(parts, key=lambda part: part[0] or (0, 0)):
            start, stop = rows or (0, len(static.weight))
            if start > end:
                pieces.append(_static_rows(static, (end, start)))
            pieces.append(dynamic)
            end = stop
        if end < len(static.weight):
            pieces.append(_static_rows(static, (end, len(static.weight))))
        new = PartialLayer(pieces)
        new.training = static.training
    for name, value in vars(static).items():
        # The very same dictionaries, so that a handle got before still removes its hook.
        if "_hooks" in name and not vars(new)[name]:
            new.__dict__[name] = value
    new._is_full_backward_hook = static._is_full_backward_hook
    return new


def keep_from_fusing(model: nn.Module, names: Iterable[str]) -> None:
    """Make the modules that hold these dynamic layers stay as they are when they are asked to fuse their weights.

    The network itself is not one of them: what it does may be for its static layers.
    """
    for holder in _holders(names):
        module = model.get_submodule(holder)
        for method in FUSING:
            if callable(getattr(type(module), method, None)):
                module.__dict__[method] = partial(_stay, module)


def draw_what_is_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Let transformers' models draw what a checkpoint has not of these dynamic layers, as they were drawn at first.

    `from_pretrained` makes a network without numbers, fills in and marks those of the checkpoint, and asks the model to
    initialize what is left, module by module, which knows torch's own alone.
    """
    for holder in ("", *_holders(names)):
        module = model.get_submodule(holder)
        if callable(getattr(type(module), "_initialize_weights", None)):
            module.__dict__["_initialize_weights"] = partial(_initialize, module)


@torch.no_grad()
def _initialize(model: Any, module: nn.Module, *arguments: Any, **named: Any) -> None:
    if not isinstance(module, KWLayer | Warehouse | CellWeights):
        type(model)._initialize_weights(model, module, *arguments, **named)
    elif not any(getattr(each, "_is_hf_initialized", False) for each in (module, *module.parameters())):
        module.reset_parameters()


def _holders(names: Iterable[str]) -> list[str]:
    """Return the modules that hold others, by name, the network itself left out."""
    return sorted({name[:end] for name in names for end in range(len(name)) if name[end] == "."})


def _stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return module


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """Return some rows of a tensor; None means all."""
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def _static_rows(static: Static, rows: tuple[int, int]) -> nn.Module:
    piece: nn.Module = _like(static, rows, nn.Linear, STATIC_CONVOLUTIONS)
    piece.weight = _some(static.weight, rows)
    piece.bias = _some(static.bias, rows)
    return piece.train(static.training)


def _some(parameter: Any, rows: tuple[int, int]) -> Any:
    if parameter is None:
        return None
    return nn.Parameter(rows_of(parameter, rows).detach().clone(), parameter.requires_grad)


def _like(static: Static, rows: Rows, linear: type[Any], convolutions: Sequence[type[Any]]) -> Any:
    """Return a layer of another class with a layer's geometry, weights still to come."""
    out_channels = len(static.weight) if rows is None else rows[1] - rows[0]
    has_bias = static.bias is not None
    if isinstance(static, nn.Linear):
        return linear(static.in_features, out_channels, has_bias, device="meta")
    return convolutions[static.weight.dim() - 3](
        static.in_channels,
        out_channels,
        static.kernel_size,
        static.stride,
        static.padding,
        static.dilation,
        static.groups,
        has_bias,
        static.padding_mode,
        device="meta",
    )
