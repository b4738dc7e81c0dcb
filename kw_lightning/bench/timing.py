"""Times of several functions, and the bytes that one keeps for its backward pass."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kw_lightning.nn.clock import elapsed

Work = Callable[[], object]


def interleaved(functions: Mapping[str, Work], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return seconds of every function and repeat; the functions take turns, so that all see the same machine.

    One round before the first warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            seconds = elapsed(function, device)
            if repeat:
                times[name].append(seconds)
    return times


def best_seconds(function: Work, device: torch.device, repeats: int) -> float:
    """Return the least seconds of some repeats."""
    return min(interleaved({"": function}, device, repeats)[""])


def median_ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of one function's time relative to another's."""
    return statistics.median(one / other for one, other in zip(times[name], times[base], strict=True))


def kept_bytes(function: Work, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages that autograd keeps while `function` runs, parameters left out.

    Args:
        function: a forward pass; what it returns is kept meanwhile.
        parameters: not counted: they are there anyway.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return tensor.detach()  # itself it would hold the graph that holds it

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
