"""Norms, sums and activations behind dynamic layers, computed in evaluation where the layers write their outputs.

Every module whose forward pass calls layers is followed (following.py); what comes after a layer and nothing else sees
becomes the layer's `Epilogue` (steps.py). Nothing is moved into weights: norms are read at every call, no module is
replaced, and whatever is not plain evaluation, or not as it was found, takes the module's own forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any

from torch import nn

from kw_lightning.nn.engine import evaluates
from kw_lightning.nn.following import calls_layers, follow, inputs_of, sequences
from kw_lightning.nn.layer import KWLayer

BEFORE = "_finished_before"
"""The attribute of a module in which its forward pass is, while it is not in use."""


def add_epilogues(network: nn.Module) -> int:
    """Let dynamic layers do in evaluation what comes after them, where that can be told, from now on.

    It is for evaluation without gradients: `network.eval()` and `torch.inference_mode()`; a network that is compiled
    after that has one operator for a layer and what comes after it. All else, training too, goes
    on as before; weights, statistics, modes, modules, and hooks on layers, norms and activations may change meanwhile.
    Hooks on an `nn.Sequential` have to be there before. A copy of the network has none of it.

    Args:
        network: it keeps its modules, and the keys of its state.

    Returns:
        The number of layers that something was found behind; 0 where torch.fx cannot follow the network.
    """
    return sum(found for _, found in _add(network))


def remove_epilogues(network: nn.Module) -> None:
    """Give every module its own forward pass again."""
    for module in network.modules():
        if isinstance(vars(module).get("forward"), _Forward):
            del vars(module)["forward"]
        vars(module).pop(BEFORE, None)


@contextmanager
def epilogues(network: nn.Module) -> Iterator[int]:
    """Within the context, let dynamic layers do in evaluation what comes after them; see `add_epilogues`.

    Yields:
        The number of layers, of those that did not do it before.
    """
    added = _add(network)
    try:
        yield sum(found for _, found in added)
    finally:
        for module, _ in added:
            vars(module).pop("forward", None)


def _add(network: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the modules that got another forward pass, each with the number of layers that do more than before."""
    added: list[tuple[nn.Module, int]] = []
    if not all(layer.epilogue for layer in network.modules() if isinstance(layer, KWLayer)):
        return added
    within: set[int] = set()  # sequences, which are part of the module that calls them
    for module in network.modules():
        before = vars(module).get("forward")
        unused = before is None or (isinstance(before, _Forward) and before.finished is None)
        if not unused or id(module) in within or not calls_layers(module):
            continue
        forward, layers = follow(module)
        if forward is not None:
            within |= {id(sequence) for sequence in sequences(module)}
            vars(module)["forward"] = _found_again(module, _Forward(module, forward))
            added.append((module, len(layers)))
    return added


def _found_again(module: nn.Module, forward: _Forward) -> _Forward:
    """Return a module's forward pass of before where it is the same: torch.compile goes by which one it is."""
    before = vars(module).setdefault(BEFORE, forward)
    if not isinstance(before, _Forward) or not before.is_as(forward):
        before = vars(module)[BEFORE] = forward
    return before


class _Forward:
    """The forward pass of a module, in its place; of a copy, and of one that was pickled, it is the module's own."""

    def __init__(self, module: nn.Module, finished: Callable[..., Any] | None) -> None:
        self.module, self.finished, self.inputs = module, finished, len(inputs_of(module))
        self.found = [(each._modules, tuple(each._modules.values())) for each in (module, *sequences(module))]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        module, finished = self.module, self.finished
        plain = finished is not None and not module.training and not named and len(inputs) == self.inputs
        if finished is None or not plain or not evaluates("auto", *inputs) or not self._are_there():
            return type(module).forward(module, *inputs, **named)
        return finished(*inputs)

    def _are_there(self) -> bool:
        """Return whether the modules are those that were found."""
        return all(
            len(modules) == len(found) and all(one is other for one, other in zip(modules.values(), found, strict=True))
            for modules, found in self.found
        )

    def is_as(self, other: _Forward) -> bool:
        """Return whether both do the same, with the same modules."""
        return self.module is other.module and self.found == other.found and self._code() == other._code()

    def _code(self) -> tuple[Any, ...] | None:
        """Return all that the forward pass goes by."""
        if not isinstance(self.finished, MethodType):
            return None
        function: Any = self.finished.__func__
        known = [function.__globals__.get(name) for name in function.__code__.co_names]
        return function.__code__, known, self.finished.__self__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:  # torch.export asks for it
        return type(self.module).forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "finished": None, "inputs": 0, "found": []}
