"""Computes by one path, and does what all have in common: types, and problems with nothing to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.factors import AttentionFactors, differentiate_alpha, make_alpha
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.paths import Path
from kw_lightning.nn.engine.problem import Operands
from kw_lightning.nn.engine.ranks import Ranked, differentiate, rank
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.engine.workspace import in_huge_pages
from kw_lightning.nn.precision import without_autocast


def forward(
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    path: Path,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Compute by one path.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells], **or** its factors.
        cells: E [cells, co, ci, *ck].
        path: one that can, see `Path.refusal`.
        epilogue: what becomes of the output, without gradients.

    Returns:
        [batch, out_channels, *output_size] in x's type and memory format.
    """
    _check_device(x, attention, cells)
    precision = path.precision(x.dtype)
    if precision != x.dtype:
        y = forward(x.to(precision), attention, cells, convolution, path).to(x.dtype)
        return y if epilogue is None else epilogue.apply(y)
    y = in_huge_pages(empty_output(x, convolution))
    if reads_nothing(x, convolution):
        return y.zero_() if epilogue is None else epilogue.apply(y.zero_())
    with without_autocast(x.device):  # α is made in single precision
        operands = _operands(x, attention, cells, convolution, path)
        if epilogue is None or epilogue.empty:
            path.forward(operands, y)
            return y
    return path.forward_finished(operands, y, epilogue)


def _check_device(x: Tensor, attention: Tensor | AttentionFactors, cells: Tensor) -> None:
    """Refuse weights on another device than an input on a CPU: C would read their addresses as a CPU's."""
    weights = (attention,) if isinstance(attention, Tensor) else attention.told
    elsewhere = next((tensor for tensor in (cells, *weights) if not tensor.is_cpu), None) if x.is_cpu else None
    if elsewhere is not None:
        what = "the cells of its warehouse" if elsewhere is cells else "its attention"
        raise RuntimeError(
            "expected a dynamic layer, its warehouse, which may stand in another layer, and its input on one device: "
            f"found the input on {x.device} and {what} on {elsewhere.device}"
        )


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor | AttentionFactors,
    cells: Tensor,
    convolution: Convolution,
    path: Path,
    needed: Sequence[bool],
    collected: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of (x, α, E), **or** of (x, hidden, weight, bias, E) of factors.

    Each is in its tensor's type, and empty where not needed, or where it was added to another.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, path: as in `forward`.
        needed: which of the gradients of (x, attention, E) to compute.
        collected: E's gradient from other layers, in its type, to which this one's is added.
    """
    of_x, of_attention, of_cells = needed
    dense = convolution.without_stride()
    if dense is not None and x.device.type == "cpu":
        picked = _pick(x, convolution)
        part, *others = backward(gradient, picked, attention, cells, dense, path, needed, collected)
        return [_spread(part, x, convolution) if of_x else part, *others]
    weights = (attention,) if isinstance(attention, Tensor) else (attention.hidden, attention.weight, attention.bias)
    tensors = (x, *weights, cells)
    found: Sequence[Tensor | None]
    if reads_nothing(x, convolution):
        found = [torch.zeros_like(tensor) for tensor in tensors]
    else:
        with without_autocast(x.device):
            operands = _operands(x.to(path.precision(x.dtype)), attention, cells, convolution, path)
            operands = operands._replace(collected=_in_single(collected))
            gradients = path.backward(gradient.to(operands.x.dtype), operands, (of_x, of_attention, of_cells))
            ranked = operands.ranked
            del operands  # and α with it, where it is made of factors
            found = [gradients.x, *_of_attention(attention, ranked, gradients), gradients.cells]
        if collected is not None and gradients.cells is not None and not gradients.adds:
            collected.add_(gradients.cells.view(collected.shape))
    own = of_cells and collected is None
    wanted = zip(found, tensors, (of_x, *[of_attention] * len(weights), own), strict=True)
    return [new.to(old.dtype) if need and new is not None else old.new_empty(0) for new, old, need in wanted]


def _pick(x: Tensor, convolution: Convolution) -> Tensor:
    """Return the positions of x that a strided 1×1 convolution reads, channels last.

    They are copied once, and the pass that reads cells without packing them can then compute the gradients.
    """
    return x[convolution.read].movedim(1, -1).contiguous().movedim(-1, 1)


def _spread(part: Tensor, x: Tensor, convolution: Convolution) -> Tensor:
    """Return the gradient of x from that of the positions that a strided 1×1 convolution reads."""
    whole = in_huge_pages(torch.empty_like(x)).zero_()
    whole[convolution.read] = part
    return whole


def _in_single(collected: Tensor | None) -> Tensor | None:
    """Return a gradient if compiled passes can add to it: they compute in single precision."""
    return collected if collected is not None and collected.dtype == torch.float32 else None


def _operands(
    x: Tensor, attention: Tensor | AttentionFactors, cells: Tensor, convolution: Convolution, path: Path
) -> Operands:
    ranked = None
    if isinstance(attention, AttentionFactors) and path.of_bases:
        ranked = rank(attention)
        attention = ranked.weights
    elif isinstance(attention, AttentionFactors):
        attention = make_alpha(attention, x.dtype, path.multiple)
    return Operands(x, attention.to(x.dtype).contiguous(), cells.to(x.dtype).contiguous(), convolution, ranked)


def _of_attention(
    attention: Tensor | AttentionFactors, ranked: Ranked | None, found: Gradients
) -> Sequence[Tensor | None]:
    """Return the gradient of α, **or** those of its factors."""
    if isinstance(attention, Tensor):
        return (found.attention,)
    if found.attention is None:
        return (None, None, None)
    exact = attention.hidden.dtype
    if ranked is None:
        return differentiate_alpha(attention, found.attention.to(exact))
    assert found.bases is not None
    return differentiate(ranked, found.attention.to(exact), found.bases.to(exact))


def reads_nothing(x: Tensor, convolution: Convolution) -> bool:
    """Return whether there is nothing to compute: an empty input or output, **or** one that reads only padding."""
    size = tuple(x.shape[2:])
    outputs = 0 in convolution.output_size(size) or convolution.kernel_shape[0] == 0
    return 0 in x.shape or outputs or not find_taps(convolution, size).taps
