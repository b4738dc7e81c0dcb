"""The engine: computes dynamic convolutions and linear layers from input, attention and cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kw_lightning.errors import mistake
from kw_lightning.nn.engine import exported, factored, finished, operators, reference, work
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue, Norm
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.engine.kept import bases
from kw_lightning.nn.engine.planner import ENGINES, check_engine, refusal
from kw_lightning.nn.engine.workspace import workspace
from kw_lightning.nn.precision import in_type

__all__ = [
    "ENGINES",
    "AttentionFactors",
    "Convolution",
    "Epilogue",
    "Norm",
    "bases",
    "dynamic_convolution",
    "dynamic_linear",
    "evaluates",
    "needs_alpha",
    "refusal",
    "work",
    "workspace",
]


def dynamic_convolution(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str = "auto",
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Convolve every sample with its own mixture of cells.

    The work is done in the type of x; α and the cells may be of higher precision and get their gradients in it.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells], **or** the factors that it can be made of.
        cells: E [cells, co, ci, *ck].
        convolution: the geometry.
        engine: one of `ENGINES`.
        epilogue: what becomes of the output; only where `evaluates` says so, since it bypasses the operator.

    Returns:
        [batch, out_channels, *output size], in the memory format of x.

    Raises:
        ValueError: an unknown engine, **or** one that cannot compute the convolution, see `refusal`.
    """
    if engine not in ENGINES:
        raise ValueError(mistake(engine, ENGINES, what="the unknown engine"))
    if epilogue is not None:
        evaluate = finished.call if torch.compiler.is_compiling() else finished.compute
        return evaluate(x, attention, cells, convolution, engine, epilogue)
    if isinstance(attention, AttentionFactors):
        if not needs_alpha(engine):
            return _by_factors(x, attention, cells, convolution, engine)
        attention = attention.alpha()
    if engine == "reference" or _taken_apart():
        check_engine(engine, convolution)
        return reference.convolve(x, attention.to(x.dtype), cells.to(x.dtype), convolution)
    if _is_exporting():
        return exported.convolve(x, in_type(attention, x.dtype), in_type(cells, x.dtype), convolution)
    y: Tensor = operators.dynamic_convolution(x, attention, cells, convolution.numbers, engine)
    return y


def dynamic_linear(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    engine: str = "auto",
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Multiply every sample's tokens by its own mixture of cells: a 1×1 convolution over the tokens.

    Args:
        x: [batch, tokens, in_features].
        attention: α [batch, mixtures, cells], **or** the factors that it can be made of.
        cells: E [cells, co, ci].
        convolution: the geometry, without spatial dimensions.
        engine, epilogue: as of `dynamic_convolution`.

    Returns:
        [batch, tokens, out_features].
    """
    if needs_alpha(engine):
        attention = attention.alpha() if isinstance(attention, AttentionFactors) else attention
        return reference.apply_linear(x, in_type(attention, x.dtype), in_type(cells, x.dtype), convolution)
    over_tokens = convolution.over_tokens()
    y = dynamic_convolution(x.transpose(1, 2), attention, cells.unsqueeze(-1), over_tokens, engine, epilogue)
    return y.transpose(1, 2)


def evaluates(engine: str, *tensors: object) -> bool:
    """Return whether an engine evaluates plainly, so that its paths may apply an epilogue to the output they write.

    That bypasses the operator, so nothing may observe it: no gradients, export, tracing or transform, no mode and no
    subclass of tensors. While torch.compile traces a network for a CPU, the layer with its epilogue is one operator of
    the graph; on GPUs compilers fuse what comes after.
    """
    if torch.is_grad_enabled() or engine == "reference" or _is_exporting():
        return False
    if torch.compiler.is_compiling():
        on_cpu = all(isinstance(tensor, Tensor) and tensor.device.type == "cpu" for tensor in tensors)
        return on_cpu and not _taken_apart()
    return (
        {*map(type, tensors)} == {Tensor}
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and not _taken_apart()
    )


def needs_alpha(engine: str) -> bool:
    """Return whether α itself is needed: by the literal form, by an exported graph, **or** by transforms."""
    return engine == "reference" or _taken_apart() or _is_exporting()


def _by_factors(x: Tensor, factors: AttentionFactors, cells: Tensor, convolution: Convolution, engine: str) -> Tensor:
    return factored.call(
        x,
        factors.hidden,
        factors.weight,
        factors.bias,
        cells,
        factors.temperature,
        factors.initial,
        convolution.numbers,
        engine,
        factors.lasting,
    )


def _taken_apart() -> bool:
    """Return whether a transform of torch.func or forward-mode differentiation is at work.

    They need the literal form, which is made of operators that they know.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_exporting() -> bool:
    """Return whether a network is being exported: by torch.export, **or** by ONNX's older exporter, which traces.

    The flag is the one that `torch.compiler.is_exporting` reads; torch 2.11's compiler takes that function for True.
    """
    if torch._C._get_tracing_state() is None:
        return torch.compiler._is_exporting_flag
    return torch.onnx.is_in_onnx_export()
