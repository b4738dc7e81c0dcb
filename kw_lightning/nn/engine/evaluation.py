"""A layer in plain evaluation as one call in C, where the planner chooses one of the compiled passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kw_lightning.nn.engine import kept
from kw_lightning.nn.engine.computing import reads_nothing
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import channels_last, empty_output
from kw_lightning.nn.engine.native import AttentionTensors, Evaluation, prepare_evaluation
from kw_lightning.nn.engine.orders import ORDERS
from kw_lightning.nn.engine.paths.compiled import CompiledPath
from kw_lightning.nn.engine.planner import choose
from kw_lightning.nn.engine.workspace import workspace_bytes

__all__ = ["AttentionTensors", "Evaluation", "prepare", "setting"]

_CPU = torch.device("cpu")


def setting() -> tuple[Any, ...]:
    """Return all beside its arguments that `prepare` goes by."""
    return torch.get_num_threads(), workspace_bytes(_CPU), kept.settings()


def prepare(
    x: Tensor,
    of: AttentionTensors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    epilogue: Epilogue,
) -> Evaluation | None:
    """Return a layer's call, None where it is not to be computed so.

    Args:
        x: [batch, in_channels, *size], for its size and layout alone.
        of: what α is made of; all tensors contiguous, in single precision on a CPU.
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`.
        epilogue: what becomes of the output.

    Raises:
        RuntimeError: x is smaller than the kernel.
    """
    convolution.check_size(tuple(x.shape[2:]))
    dense = x.is_contiguous() or channels_last(x)
    if engine not in ("auto", *ORDERS) or not dense or reads_nothing(x, convolution):
        return None
    hidden = x.new_empty(len(x), of.reduce.shape[0])
    factors = AttentionFactors(hidden, of.weight, of.bias, of.temperature, of.initial, lasting=True)
    path = choose(x, factors, cells, convolution, engine, backward=False)
    y = empty_output(x, convolution)
    if not isinstance(path, CompiledPath) or path.of_bases or not epilogue.fits(y):
        return None
    return prepare_evaluation(x, of, cells, convolution, y, path.form_of(x), epilogue)
