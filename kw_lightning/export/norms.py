"""Batch norms folded into the layers before them, for networks that no longer train.

A dynamic layer's cells are shared, so a norm goes into factors of the layer's own output channels and into its bias.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kw_lightning.nn import KWLayer, KWLinear
from kw_lightning.nn.weight import over_rows

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def fold_norms(network: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy without the batch norms that follow a convolution or a dynamic layer and nothing else does.

    Where the network cannot be traced by torch.fx, or a norm has no running statistics, norms stay as they are.

    Args:
        network: in evaluation mode; it stays as it is.

    Returns:
        The copy, which computes the same, and the number of norms that were folded.
    """
    found = _followers(network)
    if not found:
        return network, 0
    folded = copy.deepcopy(network)
    for layer, norm in found:
        _fold(folded.get_submodule(layer), folded.get_submodule(norm))
        parent, _, child = norm.rpartition(".")
        setattr(folded.get_submodule(parent), child, nn.Identity())
    return folded, len(found)


class _Tracer(fx.Tracer):
    """Goes into modules only as far as there are layers and norms to be found."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        sought = (KWLayer, _BatchNorm, *CONVOLUTIONS)
        return isinstance(m, sought) or not any(isinstance(module, sought) for module in m.modules())


def _followers(network: nn.Module) -> list[tuple[str, str]]:
    """Return (layer, norm) by name, of every pair that can be folded."""
    try:
        graph = _Tracer().trace(network)
    except Exception:  # a stranger's forward pass, which torch.fx does not follow
        return []
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            place = id(network.get_submodule(str(node.target)))
            calls[place] = calls.get(place, 0) + 1
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = (network.get_submodule(str(call.target)) for call in (before, node))
        once = calls[id(layer)] == calls[id(norm)] == 1
        if once and _foldable(layer, norm):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    # A linear layer's channels are those of the norm only where there are no tokens.
    if not isinstance(layer, (KWLayer, *CONVOLUTIONS)) or isinstance(layer, KWLinear) or type(norm) not in NORMS:
        return False
    hooked = any(vars(module)[hooks] for module in (layer, norm) for hooks in HOOKS)
    return norm.running_mean is not None and not norm.training and not hooked


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    if not isinstance(layer, KWLayer):
        numbers = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *numbers)
        return
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
    bias: Tensor = norm.running_mean.neg() if layer.bias is None else layer.bias - norm.running_mean
    layer.weight = layer.weight * over_rows(scale, layer.weight.ndim)
    layer.bias = nn.Parameter(bias * scale + (0 if norm.bias is None else norm.bias), requires_grad=False)
