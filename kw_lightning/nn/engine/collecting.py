"""One gradient of a warehouse's cells that all its layers add to in a backward pass, in place of one for each layer.

A layer's gradient of the cells is as large as they are, and autograd adds up those of all layers: with small batches,
allocating and adding them takes longer than computing them. So the first layer hands its gradient to autograd, which
keeps it until it has visited all layers; meanwhile the others add theirs to it, and return none.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kw_lightning.nn.engine import computing
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.planner import choose
from kw_lightning.nn.precision import is_recorded

HELD_TWICE = 2
"""Uses of a gradient that only autograd keeps: one by autograd, one by the Python object that looks at it."""


class _Collected(NamedTuple):
    """What a backward pass has collected.

    Attributes:
        task: the number of the backward pass.
        gradient: dead once autograd is done with it, has replaced it, or has failed.
    """

    task: int
    gradient: weakref.ref[Tensor]


class _Running(threading.local):
    """The calling thread's backward passes by their cells; an entry goes when its cells do."""

    def __init__(self) -> None:
        self.collected: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_running = _Running()


def may_collect(cells: Tensor) -> bool:
    """Return whether several layers may add to one gradient in this backward pass: autograd's, of a leaf on a CPU.

    A tensor computed from a parameter, such as its copy under autocast, has a gradient of its own for every layer; and
    whatever records or watches operators must see one that changes nothing in place.
    """
    return (
        cells.is_leaf
        and cells.device.type == "cpu"
        and not is_recorded()
        and torch._C._current_graph_task_id() >= 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients as `computing.backward` does, None for that of E if it was added to another layer's."""
    path = choose(x, attention, cells, convolution, engine, backward=True)
    collected = find(cells)
    *others, of_cells = computing.backward(gradient, x, attention, cells, convolution, path, needed, collected)
    if collected is not None:
        return [*others, None]
    hand_over(cells, of_cells)
    return [*others, of_cells]


def hand_over(cells: Tensor, gradient: Tensor) -> None:
    """Remember the gradient that the first layer of cells hands to autograd, for the others to add to."""
    _running.collected[cells] = _Collected(torch._C._current_graph_task_id(), weakref.ref(gradient))


def find(cells: Tensor) -> Tensor | None:
    """Return the gradient to add to, None where there is none."""
    found: _Collected | None = _running.collected.get(cells)
    if found is None or found.task != torch._C._current_graph_task_id():
        return None
    gradient = found.gradient()
    if gradient is None or gradient._use_count() != HELD_TWICE:  # type: ignore[attr-defined]
        return None
    return gradient
