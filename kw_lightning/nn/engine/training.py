"""A layer in training as one call in C a direction, where compiled passes for both are the fastest with their calls."""

from __future__ import annotations

from torch import Tensor

from kw_lightning.nn.engine import evaluation
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.native import AttentionTensors, Step, prepare_step
from kw_lightning.nn.engine.paths import Path
from kw_lightning.nn.engine.paths.compiled import CompiledPath
from kw_lightning.nn.engine.planner import ask, survey

__all__ = ["Step", "prepare"]

CALLING = 2e-4
"""Seconds that one call a direction saves of a small layer's step: measured 0.21 ms of 0.42."""
PICKING = 0.05
"""Part of its time that a strided kernel of one position saves where what it reads is picked out first: up to 0.06."""


def prepare(
    x: Tensor, of: AttentionTensors, cells: Tensor, convolution: Convolution, engine: str, statistics: int
) -> Step | None:
    """Return a layer's step, None where it is not to be computed so.

    Args:
        x: [batch, in_channels, *size], for its size and layout alone.
        of: what α is made of; all tensors contiguous, in single precision on a CPU.
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`.
        statistics: whose mean and variance the attention's norm takes.

    Raises:
        RuntimeError: x is smaller than the kernel.
    """
    if not evaluation.takes(x, convolution, engine):
        return None
    hidden = x.new_empty(len(x), of.reduce.shape[0])
    factors = AttentionFactors(hidden, of.weight, of.bias, of.temperature, of.initial)
    paths = _choose(x, factors, cells, convolution, engine)
    if paths is None:
        return None
    forward, backward = paths
    forms = forward.form_of(x, cells, convolution), backward.form_of(x, cells, convolution, backward=True)
    return prepare_step(x, of, cells, convolution, empty_output(x, convolution), forms, statistics)


def _choose(
    x: Tensor, factors: AttentionFactors, cells: Tensor, convolution: Convolution, engine: str
) -> tuple[CompiledPath, CompiledPath] | None:
    """Return compiled passes forward and backwards, None where other paths save more than one call each does."""
    found, longer, strided = [], 0.0, convolution.without_stride() is not None
    for backward in (False, True):
        asked = ask(x, factors, cells, convolution, engine, backward=backward)
        able = [choice for choice in survey(*asked) if choice.refusal is None]
        taken = next((choice for choice in able if _is_pass(choice.path)), None)
        if taken is None:
            return None
        fastest = able[0]
        if taken is not fastest or strided:
            if taken.seconds is None or fastest.seconds is None:
                return None
            longer += taken.seconds - fastest.seconds + PICKING * strided * taken.seconds
        found.append(taken.path)
    forward, back = found
    assert isinstance(forward, CompiledPath)
    assert isinstance(back, CompiledPath)
    return (forward, back) if longer <= CALLING else None


def _is_pass(path: Path) -> bool:
    return isinstance(path, CompiledPath) and not path.of_bases
