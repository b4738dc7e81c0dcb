"""Copies of a network inside its LightningModule: momentum encoders, teachers, target networks.

What is trained and its copy are updated parameter by parameter, so that both are static or both are dynamic.
"""

from __future__ import annotations

import torch
from torch import nn

from kw_lightning.callbacks.conversion import submodule
from kw_lightning.callbacks.layout import dynamic_layers, layout


def copies_of(pl_module: nn.Module, path: str | None) -> tuple[str, ...]:
    """Return the paths of the copies of the submodule at `path`, in the LightningModule's order.

    A copy has the class and the structure of the submodule, and weights of its own: the same numbers while it is
    static, warehouses of the same layout once it is dynamic. None is looked for where `path` is None.
    """
    if path is None:
        return ()
    target = submodule(pl_module, path)
    found: list[str] = []
    for name, module in pl_module.named_modules():
        apart = not any(_within(name, other) or _within(other, name) for other in (path, *found))
        if apart and type(module) is type(target) and _is_copy(module, target):
            found.append(name)
    return tuple(found)


def pairs(pl_module: nn.Module) -> list[tuple[str, str]]:
    """Return the paths of the parts of a LightningModule that have copies, each with that of a copy."""
    return [(name, copy) for name, _ in pl_module.named_children() for copy in copies_of(pl_module, name)]


def _within(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(f"{other}.")


def _is_copy(module: nn.Module, target: nn.Module) -> bool:
    if dynamic_layers(target):
        return bool(dynamic_layers(module)) and layout(module) == layout(target)
    own, other = dict(module.named_parameters()), dict(target.named_parameters())
    if not own or own.keys() != other.keys() or dynamic_layers(module):
        return False
    pairs = [(own[name], other[name]) for name in own]
    return all(
        a is not b and a.shape == b.shape and a.device == b.device and not a.is_meta and torch.equal(a, b)
        for a, b in pairs
    )


__all__ = ["copies_of", "pairs"]
