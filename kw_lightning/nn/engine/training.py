"""A layer in training as one call of C forward and one backward, where compiled passes are the fastest for both."""

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
"""Seconds that one call per direction saves in a small layer's step: measured 0.21 ms of 0.42."""
PICKING = 0.05
"""Share of its time that a strided 1×1 convolution saves if what it reads is copied first: measured up to 0.06."""


def prepare(
    x: Tensor, of: AttentionTensors, cells: Tensor, convolution: Convolution, engine: str, statistics: int
) -> Step | None:
    """Return a layer's step, None where other paths are faster, **or** needed.

    Args:
        x: [batch, in_channels, *size]; only its size and layout are read.
        of: what α is made of; all tensors contiguous, in single precision on a CPU.
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`.
        statistics: which mean and variance the attention's norm takes.

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
    """Return the compiled passes forward and backward, None where other paths save more than the single calls do."""
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
