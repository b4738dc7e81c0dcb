"""A layer in plain evaluation as one call of C, if the planner chooses one of the compiled passes for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kw_lightning.nn.engine import kept
from kw_lightning.nn.engine.computing import reads_nothing
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue, Norm
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.layouts import channels_last, empty_output
from kw_lightning.nn.engine.native import AttentionTensors, Evaluation, prepare_evaluation
from kw_lightning.nn.engine.orders import ORDERS
from kw_lightning.nn.engine.paths.compiled import CompiledPath
from kw_lightning.nn.engine.planner import choose
from kw_lightning.nn.engine.workspace import workspace_bytes

__all__ = ["Evaluation", "LayerTensors", "prepare", "setting"]

_CPU = torch.device("cpu")
_ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


class LayerTensors(NamedTuple):
    """Everything that a layer's output depends on beside its input, in single precision on a CPU, as C reads it.

    Attributes:
        cells: E [cells, co, ci, *ck].
        temperature: τ, a scalar; None for 0.
        initial: β [mixtures], whole numbers.
        reduce, reduce_bias: of the attention's first linear layer, [width, in_channels] and [width].
        scale, shift, mean, variance: of its norm, [width]; mean and variance None where they are a sample's.
        weight, bias: of its last linear layer.
        output_scale, output_bias: [out_channels], the layer's own.
        norm_mean, norm_variance, norm_weight, norm_bias: [out_channels], of the norm behind the layer; None for none.
    """

    cells: Tensor
    temperature: Tensor | None
    initial: Tensor
    reduce: Tensor
    reduce_bias: Tensor | None
    scale: Tensor
    shift: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor
    bias: Tensor
    output_scale: Tensor | None
    output_bias: Tensor | None
    norm_mean: Tensor | None = None
    norm_variance: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    @property
    def tau(self) -> Tensor:
        """Return τ, 0 where there is none."""
        return _ZERO if self.temperature is None else self.temperature

    @property
    def given(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean and variance of the attention's norm, None where they are a sample's."""
        return None if self.mean is None or self.variance is None else (self.mean, self.variance)

    def attention(self, epsilon: float) -> AttentionTensors:
        """Return what α is computed from.

        Args:
            epsilon: of the attention's norm.
        """
        reduction = self.reduce, self.reduce_bias, self.scale, self.shift
        return AttentionTensors(*reduction, self.given, epsilon, self.weight, self.bias, self.initial, self.tau)

    def epilogue(self, epsilon: float, added: Tensor | None, activation: str | None) -> Epilogue:
        """Return the epilogue of the output.

        Args:
            epsilon: of the norm behind the layer.
            added, activation: as of `Epilogue`.
        """
        norm = None
        if self.norm_mean is not None and self.norm_variance is not None:
            norm = Norm(self.norm_mean, self.norm_variance, self.norm_weight, self.norm_bias, epsilon)
        return Epilogue(self.output_scale, self.output_bias, norm, added, activation)


def setting() -> tuple[Any, ...]:
    """Return the settings that `prepare` depends on beside its arguments."""
    return torch.get_num_threads(), workspace_bytes(_CPU), kept.settings()


def takes(x: Tensor, convolution: Convolution, engine: str) -> bool:
    """Return whether one call of C may compute a whole layer for x; arguments as in `prepare`.

    Raises:
        RuntimeError: x is smaller than the kernel.
    """
    convolution.check_size(tuple(x.shape[2:]))
    dense = x.is_contiguous() or channels_last(x)
    return engine in ("auto", *ORDERS) and dense and not reads_nothing(x, convolution)


def prepare(
    x: Tensor,
    of: AttentionTensors,
    cells: Tensor,
    convolution: Convolution,
    engine: str,
    epilogue: Epilogue,
) -> Evaluation | None:
    """Return a layer's call, None where another path is faster, **or** needed.

    Args:
        x: [batch, in_channels, *size]; only its size and layout are read.
        of: what α is computed from; all tensors contiguous, in single precision on a CPU.
        cells: E [cells, co, ci, *ck].
        engine: one of `ENGINES`.
        epilogue: of the output.

    Raises:
        RuntimeError: x is smaller than the kernel.
    """
    if not takes(x, convolution, engine):
        return None
    hidden = x.new_empty(len(x), of.reduce.shape[0])
    factors = AttentionFactors(hidden, of.weight, of.bias, of.temperature, of.initial, lasting=True)
    path = choose(x, factors, cells, convolution, engine, backward=False)
    y = empty_output(x, convolution)
    if not isinstance(path, CompiledPath) or path.of_bases or not epilogue.fits(y):
        return None
    return prepare_evaluation(x, of, cells, convolution, y, path.form_of(x, cells, convolution), epilogue)
