"""Multiply-adds of a dynamic convolution by an engine: for the plan, for FLOP counters and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.orders import ORDERS, count, count_backward
from kw_lightning.nn.engine.planner import refusal


def forward(engine: str, convolution: Convolution, cells: int, inputs: int, outputs: int) -> int:
    """Return the multiply-adds of a forward pass for one sample, in the cheapest order that an engine may take.

    Args:
        engine: one of `ENGINES`; "reference" is the literal form, which mixes kernels.
        convolution, cells, inputs, outputs: as of `orders.count`.
    """
    return min(sum(count(order, convolution, cells, inputs, outputs)) for order in _orders(engine, convolution))


def backward(
    engine: str, convolution: Convolution, cells: int, inputs: int, outputs: int, needed: Sequence[bool]
) -> int:
    """Return the multiply-adds of a backward pass for one sample: what the forward pass mixed is mixed anew.

    Args:
        engine, convolution, cells, inputs, outputs: as of `forward`.
        needed: which of the gradients of (x, α, E) are.
    """
    orders = _orders(engine, convolution)
    return min(count_backward(order, count(order, convolution, cells, inputs, outputs), *needed) for order in orders)


def _orders(engine: str, convolution: Convolution) -> Sequence[str]:
    if engine == "reference":
        return ("mix_kernels",)
    if engine in ORDERS:
        return (engine,)
    return [order for order in ORDERS if refusal(order, convolution) is None]
