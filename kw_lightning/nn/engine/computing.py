"""Computing by one path, and what all have in common: types, and problems in which there is nothing to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.paths import Path
from kw_lightning.nn.engine.problem import Operands
from kw_lightning.nn.engine.taps import find_taps
from kw_lightning.nn.engine.workspace import in_huge_pages


def forward(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    path: Path,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Compute by one path.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        path: one that can, see `Path.refusal`.
        epilogue: what becomes of the output, without gradients.

    Returns:
        [batch, out_channels, *output_size] in x's type and memory format.
    """
    y = in_huge_pages(empty_output(x, convolution))
    if reads_nothing(x, convolution):
        return y.zero_() if epilogue is None else epilogue.apply(y.zero_())
    operands = _operands(x, attention, cells, convolution)
    if epilogue is not None:
        return path.forward_finished(operands, y, epilogue)
    path.forward(operands, y)
    return y


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    path: Path,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of (x, α, E), each in its tensor's type and empty where not needed.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, path: as in `forward`.
        needed: which of the gradients are.
    """
    of_x, of_attention, of_cells = needed
    if reads_nothing(x, convolution):
        found = Gradients(torch.zeros_like(x), torch.zeros_like(attention), torch.zeros_like(cells))
    else:
        operands = _operands(x, attention, cells, convolution)
        found = path.backward(gradient, operands, (of_x, of_attention, of_cells))
    wanted = zip((found.x, found.attention, found.cells), (x, attention, cells), needed, strict=True)
    return [new.to(old.dtype) if need and new is not None else old.new_empty(0) for new, old, need in wanted]


def _operands(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution) -> Operands:
    return Operands(x, attention.to(x.dtype).contiguous(), cells.to(x.dtype).contiguous(), convolution)


def reads_nothing(x: Tensor, convolution: Convolution) -> bool:
    """Return whether there is nothing to compute: an empty input or output, **or** one that reads only padding."""
    size = tuple(x.shape[2:])
    outputs = 0 in convolution.output_size(size) or convolution.kernel_shape[0] == 0
    return 0 in x.shape or outputs or not find_taps(convolution, size).taps
