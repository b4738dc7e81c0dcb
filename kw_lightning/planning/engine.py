"""Which way of computing every dynamic layer of a plan would take, at what time, and why it would take no other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kw_lightning.nn.attention import factors_width, low_rank_form
from kw_lightning.nn.engine import Convolution, work
from kw_lightning.nn.engine.paths import Path
from kw_lightning.nn.engine.planner import Choice, survey
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.partition import Shape
from kw_lightning.planning.tracing import batch_first
from kw_lightning.planning.types import LayerPlan, Plan
from kw_lightning.recipe.types import Attention


@dataclass(frozen=True)
class LayerPaths:
    """One layer, or several that are alike: the same convolution of the same sizes.

    Attributes:
        names: of the layers; one that the network calls more than once stands here as often.
        problem: the forward pass; its batch counts the samples that the layer sees, windows and the like each.
        forward, backward: what the planner makes of every path, cheapest first, then those that are not taken.
    """

    names: tuple[str, ...]
    problem: Problem
    forward: tuple[Choice, ...]
    backward: tuple[Choice, ...]

    @property
    def chosen(self) -> tuple[Path, Path]:
        """Return the paths that run, forward and backward."""
        return self.forward[0].path, self.backward[0].path

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data."""
        convolution = self.problem.convolution
        return {
            "names": list(self.names),
            "kernel_shape": list(convolution.kernel_shape),
            "cell_shape": list(convolution.cell_shape),
            "size": list(self.problem.size),
            "samples": self.problem.batch,
            "cells": self.problem.cells,
            **{
                name: [
                    {"path": choice.path.name, "seconds": choice.seconds, "refusal": choice.refusal}
                    for choice in choices
                ]
                for name, choices in (("forward", self.forward), ("backward", self.backward))
            },
        }


@dataclass(frozen=True)
class EnginePlan:
    """How the dynamic layers of a plan are computed.

    Attributes:
        engine: the recipe's.
        batch: samples of a batch.
        dtype, device: in which, and where, is computed.
        layers: in the plan's order, those that are alike together; none where no path is chosen.
        note: why there are no layers; None where there are.
    """

    engine: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    layers: tuple[LayerPaths, ...]
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "engine": self.engine,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "note": self.note,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def plan_engine(
    plan: Plan, batch: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> EnginePlan:
    """Return how the dynamic layers of a plan are computed on this machine.

    Args:
        plan: of a network whose forward pass is known, else the note says that it is not.
        batch: samples of a batch.
        dtype: in which is computed.
        device: where; None is the CPU.
    """
    device = torch.device("cpu") if device is None else device
    engine = plan.recipe.engine
    found: dict[Problem, list[str]] = {}
    for name, problem in _problems(plan, batch, dtype, device):
        found.setdefault(problem, []).append(name)
    note = None
    if engine == "reference":
        found, note = {}, "the literal form is computed, and no path chosen"
    elif not found:
        note = plan.macs_note or "no dynamic layer is called"
    layers = tuple(
        LayerPaths(tuple(names), problem, survey(problem, engine), survey(problem._replace(backward=True), engine))
        for problem, names in found.items()
    )
    return EnginePlan(engine, batch, dtype, device, layers, note)


def _problems(plan: Plan, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Problem]]:
    """Yield the name of a layer and the problem that it poses, for every call of it."""
    for warehouse in plan.warehouses:
        for layer in warehouse.layers:
            for inputs in layer.inputs:
                samples, *rest = batch_first(inputs, warehouse.spec.batch_dim or 0)
                convolution, size = _convolution(layer, tuple(rest))
                cells, attention = warehouse.partition.cells, warehouse.spec.attention
                width = _factors_width(layer, attention, convolution, batch * samples, plan.recipe.engine)
                width = width if warehouse.spec.dynamic else None
                yield layer.name, Problem(convolution, batch * samples, size, cells, dtype, device, width=width)


def _factors_width(
    layer: LayerPlan, attention: Attention, convolution: Convolution, batch: int, engine: str
) -> int | None:
    """Return the width of the factors that a layer hands to the engine in training, None where it hands over α."""
    width = factors_width(layer.layer.in_channels, attention.reduction, None, attention.function)
    if width is None or attention.basis is None:
        return width
    form, cell = low_rank_form(layer.partition, attention.basis, width), math.prod(convolution.cell_shape)
    along_rank = work.mixes_along_rank(engine, convolution)
    return width if form.counts_less(batch, cell, along_rank=along_rank, still=False) else None


def _convolution(layer: LayerPlan, shape: Shape) -> tuple[Convolution, Shape]:
    """Return what a layer hands to the engine for an input [channels, *size] or [*tokens, features], and the size."""
    partition, reading = layer.partition, layer.layer.reading
    if reading is None:
        return Convolution(partition.kernel_shape, partition.cell_shape).over_tokens(), (math.prod(shape[:-1]),)
    convolution = Convolution(
        partition.kernel_shape,
        partition.cell_shape,
        reading.stride,
        reading.padding,
        reading.dilation,
        layer.layer.groups,
    )
    return convolution, tuple(n + more for n, more in zip(shape[1:], reading.padded_before, strict=True))
