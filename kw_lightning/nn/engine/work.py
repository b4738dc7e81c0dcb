"""Multiply-adds of a dynamic convolution by an engine: for the plan, for FLOP counters and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.nn.engine import ranks
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.orders import ORDERS, count, count_along_rank, count_backward
from kw_lightning.nn.engine.paths.compiled import dense_refusal
from kw_lightning.nn.engine.planner import ALONG_RANK, refusal


def forward(
    engine: str,
    convolution: Convolution,
    cells: int,
    inputs: int,
    outputs: int,
    *,
    batch: int = 1,
    width: int | None = None,
) -> int:
    """Return the multiply-adds of a forward pass, in the cheapest order that an engine may take.

    Args:
        engine: one of `ENGINES`; "reference" is the literal form, which mixes kernels.
        convolution, cells, inputs, outputs: as of `orders.count`.
        batch: samples.
        width: of the attention's hidden layer, along which bases may be mixed, in every pass anew; None for α alone.
    """
    counted = [batch * sum(count(order, convolution, cells, inputs, outputs)) for order in _orders(engine, convolution)]
    if width is not None and mixes_along_rank(engine, convolution):
        ranked = count_along_rank(convolution, cells, outputs, batch=batch, ranks=ranks.count(width))
        counted.append(ranked)
    return min(counted)


def backward(
    engine: str,
    convolution: Convolution,
    cells: int,
    inputs: int,
    outputs: int,
    needed: Sequence[bool],
    *,
    batch: int = 1,
    width: int | None = None,
) -> int:
    """Return the multiply-adds of a backward pass: what the forward pass mixed is mixed anew.

    Args:
        engine, convolution, cells, inputs, outputs, batch, width: as of `forward`.
        needed: which of the gradients of (x, attention, E) are.
    """
    counted = [
        batch * count_backward(order, count(order, convolution, cells, inputs, outputs), *needed)
        for order in _orders(engine, convolution)
    ]
    if width is not None and mixes_along_rank(engine, convolution):
        ranked = count_along_rank(convolution, cells, outputs, batch=batch, ranks=ranks.count(width), needed=needed)
        counted.append(ranked)
    return min(counted)


def mixes_along_rank(engine: str, convolution: Convolution) -> bool:
    """Return whether an engine may mix a convolution's kernels of bases, where the attention's factors are at hand."""
    return engine in ALONG_RANK and dense_refusal(convolution) is None


def _orders(engine: str, convolution: Convolution) -> Sequence[str]:
    if engine == "reference":
        return ("mix_kernels",)
    if engine in ORDERS:
        return (engine,)
    return [order for order in ORDERS if refusal(order, convolution) is None]
