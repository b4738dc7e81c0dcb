"""A layer in plain evaluation as one operator: its attention, the convolution and the epilogue.

`kw_lightning::attended_convolution` is for graphs that torch.compile makes. All that a layer depends on are arguments,
so a graph holds no values of its own; a call in C that was prepared before is found again by their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kw_lightning.nn.engine import evaluation, factored, native, reference
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.evaluation import LayerTensors
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.native import GIVEN, OF_SAMPLE
from kw_lightning.nn.engine.planner import check_engine

NAME = "attended_convolution"
SCHEMA = (
    "(Tensor x, Tensor?[] tensors, Tensor? added, int[] geometry, float[] epsilons, str engine, str? activation) "
    "-> Tensor"
)
MOST_CALLS = 4096
"""Prepared calls that are kept, of all layers, sizes, numbers of threads and settings together."""

# Prepared calls in C by everything that they depend on, None where there is none. They hold no tensor of a layer.
_calls: dict[tuple[Any, ...], evaluation.Evaluation | None] = {}

_library = torch.library.Library("kw_lightning", "FRAGMENT")
_library.define(NAME + SCHEMA)


def call(
    x: Tensor,
    tensors: LayerTensors,
    added: Tensor | None,
    convolution: Convolution,
    epsilons: tuple[float, float],
    engine: str,
    activation: str | None,
) -> Tensor:
    """Return a layer's output for x after its epilogue, by the operator.

    Args:
        x: [batch, in_channels, *size], of the type and device of `tensors`.
        tensors: of the right shapes and types, which the operator does not check at every call.
        added, activation: as of `Epilogue`.
        convolution: the geometry.
        epsilons: of the attention's norm, and of that behind the layer.
        engine: one of `ENGINES`.
    """
    y: Tensor = torch.ops.kw_lightning.attended_convolution(
        x, list(tensors), added, convolution.numbers, epsilons, engine, activation
    )
    return y


def _compute(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    added: Tensor | None,
    geometry: Sequence[int],
    epsilons: Sequence[float],
    engine: str,
    activation: str | None,
) -> Tensor:
    layer = LayerTensors(*tensors)  # type: ignore[arg-type]  # a schema has no list of both kinds
    key = (
        x.shape,
        x.stride(),
        None if added is None else (added.shape, added.stride(), added.dtype),
        # With the geometry, these two shapes determine all others.
        layer.cells.shape,
        layer.reduce.shape,
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        *geometry,
        *epsilons,
        engine,
        activation,
        *evaluation.setting(),
    )
    found = _calls.get(key)
    if found is not None:
        return found.run(x, added)
    convolution = Convolution.of(layer.cells.shape[1:], geometry)
    epilogue = layer.epilogue(epsilons[1], added, activation)
    if key not in _calls:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        found = evaluation.prepare(x, layer.attention(epsilons[0]), layer.cells, convolution, engine, epilogue)
        _calls[key] = found
        if found is not None:
            return found.run(x, added)
    # Another path is faster, or the batch is empty.
    hidden = _activate(x, layer, epsilons[0])
    factors = AttentionFactors(hidden, layer.weight, layer.bias, layer.tau, layer.initial, lasting=True)
    return factored.compute(x, factors, layer.cells, convolution, engine, epilogue)


def _activate(x: Tensor, tensors: LayerTensors, epsilon: float) -> Tensor:
    """Return the attention's hidden activations [batch, width]."""
    maps, reduction = x.flatten(2), (tensors.reduce, tensors.reduce_bias, tensors.scale, tensors.shift)
    if native.weighs(x) and 1 in maps.stride()[1:] and x.numel():
        statistics = OF_SAMPLE if tensors.given is None else GIVEN
        return native.activate(maps, *reduction, tensors.given, 0.0, epsilon, statistics).hidden
    return reference.activate(maps, *reduction, tensors.given, epsilon, by_sample=tensors.given is None)


def _imagine(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    added: Tensor | None,
    geometry: Sequence[int],
    epsilons: Sequence[float],
    engine: str,
    activation: str | None,
) -> Tensor:
    cells = tensors[0]
    assert cells is not None
    convolution = Convolution.of(cells.shape[1:], geometry)
    check_engine(engine, convolution)
    return empty_output(x, convolution)


_library.impl(NAME, _compute, "CPU")
torch.library.register_fake(f"kw_lightning::{NAME}", _imagine, lib=_library)
