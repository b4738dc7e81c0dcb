"""One step in place of a layer and of what comes after it: where all is as it was found, done by the layer itself.

A step looks at its modules at every call: what has hooks, is trained, or is another by now, is called by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from kw_lightning.nn.convolutions import KWConv1d, KWConv2d, KWConv3d
from kw_lightning.nn.engine import Epilogue, Norm
from kw_lightning.nn.engine.epilogue import ACTIVATIONS
from kw_lightning.nn.precision import is_unheard

DYNAMIC = (KWConv1d, KWConv2d, KWConv3d)
STATIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DIMENSIONS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}


def is_norm(module: nn.Module | None) -> bool:
    """Return whether it is a batch norm, torch's or timm's."""
    return type(module) in DIMENSIONS or _is_of_timm(module)


def _is_of_timm(module: nn.Module | None) -> bool:
    """Return whether it is timm's norm with an activation."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def activation_within(norm: nn.Module | None) -> nn.Module | None:
    """Return the activation that a norm of timm's has."""
    act = getattr(norm, "act", None) if _is_of_timm(norm) else None
    return None if type(act) is nn.Identity else act


def run(
    layer: nn.Module, norm: nn.Module | None, x: Tensor, added: Tensor | None, in_place: bool, activation: Any
) -> Tensor:
    """Return what comes after a layer, in one step where all is as it was found; in plain evaluation.

    Args:
        layer, norm: as they are now.
        x: the layer's input.
        added: what is added to the norm's output.
        in_place: the sum has the type of that.
        activation: the name of one, **or** its module.
    """
    if not hooks._has_any_global_hook() and is_unheard(layer) and _is_of_type(added, x):
        epilogue = _epilogue(norm, added, activation)
        if epilogue is not None and _is_dynamic(layer, norm, x):
            return layer.finished(x, epilogue)  # type: ignore[operator, no-any-return]
        if epilogue is not None and _is_static(layer, x):
            return _convolve(layer, x, epilogue)
    y = layer(x)
    y = y if norm is None else norm(y)
    if added is not None:
        y = y.add_(added) if in_place else y + added
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    found: Tensor = y if function is None else function(y)
    return found


def _is_of_type(added: Tensor | None, x: Tensor) -> bool:
    """Return whether a sum is of the type in which it is computed."""
    return added is None or (added.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type))


def _epilogue(norm: nn.Module | None, added: Tensor | None, activation: Any) -> Epilogue | None:
    """Return what comes after a layer, None where it is another than can be done at once."""
    numbers = None
    if norm is not None:
        if norm.training or not is_norm(norm) or not is_unheard(norm):
            return None
        statistics, factors = norm._buffers, norm._parameters
        mean, variance = statistics["running_mean"], statistics["running_var"]
        if mean is None or variance is None:
            return None
        numbers = Norm(mean, variance, factors["weight"], factors["bias"], norm.eps)  # type: ignore[arg-type]
        within = activation_within(norm)
        if _is_of_timm(norm) and type(norm.drop) is not nn.Identity:
            return None
        if within is not None:
            if added is not None or activation is not None:
                return None
            activation = within
    if isinstance(activation, nn.Module):
        activation = NAMES.get(type(activation)) if is_unheard(activation) else None
        if activation is None:
            return None
    return Epilogue(None, None, numbers, added, activation)


def _is_dynamic(layer: nn.Module, norm: nn.Module | None, x: Tensor) -> bool:
    """Return whether a layer can do what comes after it; what torch refuses is left to torch."""
    if not isinstance(layer, DYNAMIC) or type(layer).forward is not KWConv2d.forward:
        return False
    sides = layer.dimensions if norm is None else DIMENSIONS.get(type(norm), 2)
    fits = sides == layer.dimensions == x.dim() - 2 and (norm is None or norm.num_features == layer.out_channels)
    return bool(fits) and layer.epilogue and layer.engine != "reference"


def _is_static(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a norm's factors go into a convolution's weights: where those are fewer than its input."""
    if type(layer) not in STATIC or torch.is_autocast_enabled(x.device.type):
        return False
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64) and weight.numel() < x.numel()


def _convolve(layer: Any, x: Tensor, epilogue: Epilogue) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if epilogue.norm is not None:
        weight, bias = _join_norm(weight, bias, epilogue.norm)
    return replace(epilogue, norm=None).apply(layer._conv_forward(x, weight, bias))


def _join_norm(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return a convolution's weight and bias with the norm's factors; torch's makes parameters, which end a graph."""
    factor = torch.rsqrt(norm.variance + norm.epsilon)
    factor = factor if norm.weight is None else factor * norm.weight
    term = -norm.mean if bias is None else bias - norm.mean
    term = term * factor if norm.bias is None else torch.addcmul(norm.bias, term, factor)
    return weight * factor.view(-1, *[1] * (weight.dim() - 1)), term
