"""In which type a layer computes: its weights' own, as torch's layers do, or that of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors: others, quantised or shared out, have their own way with operators."""


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor as one of torch's own type, where its type is a name and methods for memory like any other's."""
    kind = type(tensor)
    if kind in PLAIN or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast asks for on a device; None where it is off, or there is none (`meta`)."""
    kind = device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operators compute in the types of their operands, under autocast too."""
    return nullcontext() if autocast_type(device) is None else torch.autocast(device.type, enabled=False)


# Older compilers cannot trace the question.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type; a conversion to its own type is left out, which an exported graph would hold."""
    return x if x.dtype == dtype else x.to(dtype)


def compute_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type in which to compute.

    Raises:
        RuntimeError: x is of another type than the weight, and autocast does not turn both to its own.
    """
    autocast = autocast_type(x.device)
    if autocast is not None and x.is_floating_point():
        return autocast
    if x.dtype != weight.dtype:
        raise RuntimeError(f"input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    return x.dtype


def call_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Call a linear layer in the type of x: half networks attend in float32.

    It is called as a module, so that parametrizations, pruning, quantization and hooks on it do what they are for.
    """
    own = linear._parameters.get("weight")
    if own is None:
        own = next(linear.parameters(), None)
    fits = own is None or own.dtype == x.dtype
    if isinstance(linear, nn.Linear) and is_plain(linear, nn.Linear) and not (fits and is_recorded()):
        # What the calls below do, in half their time or less.
        bias = None if linear.bias is None else in_type(linear.bias, x.dtype)
        return F.linear(x, in_type(linear.weight, x.dtype), bias)
    if fits:
        return linear(x)  # type: ignore[no-any-return]
    tensors = (*linear.named_parameters(), *linear.named_buffers())
    cast = {name: tensor.to(x.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors}
    return functional_call(linear, cast, (x,))  # type: ignore[no-any-return]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is just of a kind, neither parametrized nor pruned nor hooked, its `forward` its own."""
    if type(module) is not kind or _has_any_global_hook():
        return False
    return is_unheard(module) and not (module._backward_pre_hooks or module._backward_hooks)


def is_unheard(module: nn.Module) -> bool:
    """Return whether nothing is told of a module's calls forward, or put in their place."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_recorded() -> bool:
    """Return whether a graph is made, which is to hold modules and operators by their names."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
