"""The engine with an epilogue as one operator, for evaluation in graphs that torch.compile makes.

`kw_lightning::finished_convolution` has no gradient. It is not registered by `torch.library.custom_op`, whose checks
at every call take longer than a small layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kw_lightning.nn.engine import computing, factored
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue, Norm
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.planner import check_engine, choose

NAME = "finished_convolution"
SCHEMA = (
    "(Tensor x, Tensor[] attention, Tensor cells, int[] geometry, str engine, bool lasting, Tensor?[] factors, "
    "float epsilon, Tensor? added, str? activation) -> Tensor"
)

_library = torch.library.Library("kw_lightning", "FRAGMENT")
_library.define(NAME + SCHEMA)


def compute(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    epilogue: Epilogue | None,
) -> Tensor:
    """Return the convolution of every sample with its own mixture of cells, after the epilogue; without gradients.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells], **or** its factors.
        cells: E [cells, co, ci, *ck].
        convolution: the geometry.
        engine: one of `ENGINES`.
        epilogue: what becomes of the output, if anything.
    """
    if isinstance(attention, AttentionFactors):
        return factored.compute(x, attention, cells, convolution, engine, epilogue)
    path = choose(x, attention, cells, convolution, engine, backward=False)
    return computing.forward(x, attention, cells, convolution, path, epilogue)


def call(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    epilogue: Epilogue,
) -> Tensor:
    """Return what `compute` returns, by the operator."""
    lasting = False
    if isinstance(attention, Tensor):
        tensors = [attention]
    else:
        lasting = attention.lasting
        tensors = [attention.hidden, attention.weight, attention.bias, attention.temperature, attention.initial]
    norm = epilogue.norm
    y: Tensor = torch.ops.kw_lightning.finished_convolution(
        x,
        tensors,
        cells,
        convolution.numbers,
        engine,
        lasting,
        [epilogue.scale, epilogue.bias, *([None] * 4 if norm is None else norm[:4])],
        0.0 if norm is None else norm.epsilon,
        epilogue.added,
        epilogue.activation,
    )
    return y


def _compute(
    x: Tensor,
    attention: Sequence[Tensor],
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
    lasting: bool,
    factors: Sequence[Tensor | None],
    epsilon: float,
    added: Tensor | None,
    activation: str | None,
) -> Tensor:
    convolution = Convolution.of(cells.shape[1:], geometry)
    scale, bias, mean, variance, weight, shift = factors
    norm = None if mean is None or variance is None else Norm(mean, variance, weight, shift, epsilon)
    if len(attention) == 1:
        weights: Tensor | AttentionFactors = attention[0]
    else:
        hidden, last, constant, temperature, initial = attention
        weights = AttentionFactors(hidden, last, constant, temperature, initial, lasting)
    return compute(x, weights, cells, convolution, engine, Epilogue(scale, bias, norm, added, activation))


def _imagine(
    x: Tensor,
    attention: Sequence[Tensor],
    cells: Tensor,
    geometry: Sequence[int],
    engine: str,
    *_: object,
) -> Tensor:
    convolution = Convolution.of(cells.shape[1:], geometry)
    check_engine(engine, convolution)
    return empty_output(x, convolution)


_library.impl(NAME, _compute, "CompositeExplicitAutograd")
torch.library.register_fake(f"kw_lightning::{NAME}", _imagine, lib=_library)
