"""Chooses the path for a problem: by counted work and seconds per unit of it, or by timing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.errors import sentence
from kw_lightning.nn.engine import autotune, kept
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import cpu_seconds, gpu_seconds
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.orders import ORDERS
from kw_lightning.nn.engine.paths import PATHS, Path, find_path, order_of
from kw_lightning.nn.engine.paths.mix_kernels.along_rank import AlongRank
from kw_lightning.nn.engine.problem import Problem

ENGINES = ("auto", "autotune", *ORDERS, "reference")
# The engines that may mix along the attention's rank.
ALONG_RANK = ("auto", "autotune", "mix_kernels")
# Stands for any device: compiled paths refuse it, and those of torch's operators refuse a geometry alone.
_ANYWHERE = torch.device("meta")


@dataclass(frozen=True)
class Choice:
    """A path, as the planner sees it for a problem.

    Attributes:
        path: the path.
        refusal: why it is not taken: it cannot, **or** is never the fastest; None where it may be.
        seconds: about how long it takes; None where it is not taken, or has not been timed on such a convolution.
    """

    path: Path
    refusal: str | None
    seconds: float | None


def refusal(engine: str, convolution: Convolution) -> str | None:
    """Return why an engine cannot compute a convolution on any device, None where it can on some."""
    problem = Problem(convolution, 1, convolution.kernel_shape[2:], 1, torch.float32, _ANYWHERE)
    reasons = [path.refusal(problem) for path in _candidates(engine) if not path.of_bases]
    return None if None in reasons else reasons[-1]


def check_engine(engine: str, convolution: Convolution) -> None:
    """Check that an engine can compute a convolution.

    Raises:
        ValueError: it cannot.
    """
    reason = refusal(engine, convolution)
    if reason is not None:
        raise ValueError(_sentence(engine, convolution, reason))


def choose(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    *,
    backward: bool,
) -> Path:
    """Return the path for a pass.

    The same shapes always get the same path, unless `engine` is "autotune".

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells], **or** its factors.
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`, **or** the name of a path.
        backward: choose for the backward pass instead of the forward pass.

    Raises:
        ValueError: an engine that cannot compute the convolution.
    """
    problem, engine = ask(x, attention, cells, convolution, engine, backward=backward)
    ranked = rank(problem, engine)
    if engine == "autotune" and len(ranked) > 1 and x.numel():
        return autotune.fastest(ranked, x, attention, cells, convolution, backward=backward)
    return ranked[0]


def ask(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    *,
    backward: bool,
) -> tuple[Problem, str]:
    """Return the problem, and the engine for it under the setting of `bases`; arguments as in `choose`."""
    problem = Problem.of(x, attention, cells, convolution, backward=backward)
    if problem.width is not None and kept.use() == "never":
        return problem._replace(width=None), engine
    if problem.width is not None and kept.use() == "always" and engine in ALONG_RANK:
        return problem, AlongRank.name
    return problem, engine


@functools.lru_cache(maxsize=4096)
def rank(problem: Problem, engine: str) -> tuple[Path, ...]:
    """Return the paths of an engine that may compute a problem, the one that should be fastest first.

    Args:
        problem: what is to be computed.
        engine: one of `ENGINES`, **or** the name of a path.

    Raises:
        ValueError: none of them can.
    """
    choices = survey(problem, engine)
    found = tuple(choice.path for choice in choices if choice.refusal is None)
    if not found:
        raise ValueError(_sentence(engine, problem.convolution, choices[-1].refusal))
    return found


def survey(problem: Problem, engine: str) -> tuple[Choice, ...]:
    """Return all paths of an engine: those that may compute a problem, cheapest first, then the others with reasons."""
    given = problem.handed_over()
    choices = [_look_at(path, given, named=engine == path.name) for path in _candidates(engine)]
    able = [choice for choice in choices if choice.refusal is None]
    able.sort(key=lambda choice: math.inf if choice.seconds is None else choice.seconds)
    return (*able, *(choice for choice in choices if choice.refusal is not None))


def _look_at(path: Path, problem: Problem, *, named: bool) -> Choice:
    reason = path.refusal(problem)
    if reason is None and not named:
        reason = path.unsuited(problem)
    if reason is not None or problem.convolution.groups > 1:  # of those no path has been timed systematically
        return Choice(path, reason, None)
    known = path.fitted if problem.on_cpu else path.fitted_gpu
    if known is None:
        return Choice(path, None, None)
    load, backward = path.load(problem), problem.backward
    if problem.on_cpu:
        return Choice(path, None, cpu_seconds(load, known, backward=backward))
    return Choice(path, None, gpu_seconds(load, known, problem.dtype, backward=backward))


def _candidates(engine: str) -> tuple[Path, ...]:
    if engine in ORDERS:
        return tuple(path for path in PATHS if order_of(path) == engine)
    named = find_path(engine)
    return PATHS if named is None else (named,)


def _sentence(engine: str, convolution: Convolution, reason: str | None) -> str:
    found = (
        f'engine "{engine}" for a convolution of kernel {list(convolution.kernel_shape)} in {convolution.groups} '
        f"groups with cells {list(convolution.cell_shape)} ({reason})"
    )
    return sentence(found, ", ".join(engine for engine in ENGINES if refusal(engine, convolution) is None))
