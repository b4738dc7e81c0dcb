"""The engine: computes dynamic convolutions and linear layers from input, attention and cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kw_lightning.errors import mistake
from kw_lightning.nn.engine import exported, factored, operators, reference, work
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.kept import bases
from kw_lightning.nn.engine.planner import ENGINES, check_engine, refusal
from kw_lightning.nn.engine.workspace import workspace
from kw_lightning.nn.precision import in_type

__all__ = [
    "ENGINES",
    "AttentionFactors",
    "Convolution",
    "bases",
    "dynamic_convolution",
    "dynamic_linear",
    "needs_alpha",
    "refusal",
    "work",
    "workspace",
]


def dynamic_convolution(
    x: Tensor, attention: Tensor | AttentionFactors, cells: Tensor, convolution: Convolution, engine: str = "auto"
) -> Tensor:
    """Convolve every sample with its own mixture of cells.

    The work is done in the type of x; α and the cells may be of higher precision and get their gradients in it.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells], **or** the factors that it can be made of.
        cells: E [cells, co, ci, *ck].
        convolution: the geometry.
        engine: one of `ENGINES`.

    Returns:
        [batch, out_channels, *output size], in the memory format of x.

    Raises:
        ValueError: an unknown engine, **or** one that cannot compute the convolution, see `refusal`.
    """
    if engine not in ENGINES:
        raise ValueError(mistake(engine, ENGINES, what="the unknown engine"))
    if isinstance(attention, AttentionFactors):
        if not needs_alpha(engine):
            return _by_factors(x, attention, cells, convolution, engine)
        attention = attention.alpha()
    if engine == "reference" or _taken_apart():
        check_engine(engine, convolution)
        return reference.convolve(x, attention.to(x.dtype), cells.to(x.dtype), convolution)
    if torch.compiler.is_exporting():
        return exported.convolve(x, in_type(attention, x.dtype), in_type(cells, x.dtype), convolution)
    y: Tensor = operators.dynamic_convolution(
        x,
        attention,
        cells,
        convolution.kernel_shape,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
        engine,
    )
    return y


def dynamic_linear(
    x: Tensor, attention: Tensor | AttentionFactors, cells: Tensor, convolution: Convolution, engine: str = "auto"
) -> Tensor:
    """Multiply every sample's tokens by its own mixture of cells: a 1×1 convolution over the tokens.

    Args:
        x: [batch, tokens, in_features].
        attention: α [batch, mixtures, cells], **or** the factors that it can be made of.
        cells: E [cells, co, ci].
        convolution: the geometry, without spatial dimensions.
        engine: one of `ENGINES`.

    Returns:
        [batch, tokens, out_features].
    """
    if needs_alpha(engine):
        attention = attention.alpha() if isinstance(attention, AttentionFactors) else attention
        return reference.apply_linear(x, in_type(attention, x.dtype), in_type(cells, x.dtype), convolution)
    y = dynamic_convolution(x.transpose(1, 2), attention, cells.unsqueeze(-1), convolution.over_tokens(), engine)
    return y.transpose(1, 2)


def needs_alpha(engine: str) -> bool:
    """Return whether α itself is wanted: by the literal form, by an exported graph, **or** by transforms."""
    return engine == "reference" or _taken_apart() or torch.compiler.is_exporting()


def _by_factors(x: Tensor, factors: AttentionFactors, cells: Tensor, convolution: Convolution, engine: str) -> Tensor:
    y: Tensor = factored.factored_convolution(
        x,
        factors.hidden,
        factors.weight,
        factors.bias,
        cells,
        factors.temperature,
        factors.initial,
        convolution.kernel_shape,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
        engine,
        factors.lasting,
    )
    return y


def _taken_apart() -> bool:
    """Return whether a transform of torch.func or forward-mode differentiation is at work.

    They need the literal form, which is made of operators that they know.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
