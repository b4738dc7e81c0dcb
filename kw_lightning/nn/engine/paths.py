"""The ways to compute a dynamic convolution, by name, and what they have in common: types, layouts, live taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kw_lightning.nn.engine import convolutions, joint_inputs, joint_outputs, mix_inputs, mix_outputs, native, products
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.taps import find_taps, identity, put, take
from kw_lightning.nn.engine.workspace import in_huge_pages

# Paths made of matrix products on channels-last rows, by name.
_ROWS = {
    "products": products,
    "mix_inputs": mix_inputs,
    "mix_outputs": mix_outputs,
    "joint_inputs": joint_inputs,
    "joint_outputs": joint_outputs,
}
# Paths that call the library's convolution: whether once a chunk of samples (grouped) or once a sample.
_CALLS = {"grouped": True, "per_sample": False}
# Compiled passes: their order of computation.
_NATIVE = {"fused": "mix_kernels", "winograd": "winograd", "fused_inputs": "mix_inputs", "depthwise": "depthwise"}
PATHS = (*_NATIVE, *_ROWS, *_CALLS)


def refusal(path: str, convolution: Convolution, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a path cannot compute a convolution, None where it can: the geometry's reasons before the machine's.

    Cells span one kernel position or all of them, which is what a partition gives; compiled passes take the first.
    """
    if path in _CALLS:
        return None
    if path == "depthwise":
        if not _is_depthwise(convolution):
            return "it is for convolutions of every channel by itself"
    elif convolution.groups > 1:
        return "its products take all input channels together and know no groups"
    split = math.prod(convolution.cell_shape[2:]) == 1
    if path not in _NATIVE:
        whole = convolution.cell_shape[2:] == convolution.kernel_shape[2:]
        return None if split or whole else "its cells span one kernel position or all of them"
    if not split:
        return "its cells span one kernel position"
    if path == "winograd" and not native.allows_winograd(convolution):
        return "it is for three kernel positions a dimension, without stride or dilation"
    if dtype != torch.float32 or device.type != "cpu":
        return f"it computes in float32 on a CPU, not in {str(dtype).removeprefix('torch.')} on {device.type}"
    return None if native.available() else "its compiled passes are not to be had here"


def empty_output(x: Tensor, convolution: Convolution) -> Tensor:
    """Return an uninitialised output for x [batch, in_channels, *size], in x's memory format."""
    size = convolution.output_size(tuple(x.shape[2:]))
    shape = (x.shape[0], convolution.kernel_shape[0], *size)
    if _channels_last(x):
        return x.new_empty(shape[0], *size, shape[1]).movedim(-1, 1)
    return x.new_empty(shape)


def forward(x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, path: str) -> Tensor:
    """Compute by one path.

    Args:
        x: [batch, in_channels, *size].
        attention: α [batch, mixtures, cells].
        cells: E [cells, co, ci, *ck].
        path: one of `PATHS` that can, see `refusal`.

    Returns:
        [batch, out_channels, *output_size] in x's type and memory format.
    """
    attention, cells = attention.to(x.dtype).contiguous(), cells.to(x.dtype).contiguous()
    y = in_huge_pages(empty_output(x, convolution))
    if _reads_nothing(x, y.shape, convolution):
        return y.zero_()
    if path in _NATIVE:
        native.forward(_mapped(x), attention, cells, convolution, y, _NATIVE[path])
        return y
    if path in _CALLS:
        convolutions.forward(x, attention, cells, convolution, y, _CALLS[path])
        return y
    form = _Rows(x, attention, cells, convolution, path)
    out = y.movedim(1, -1)
    if form.direct or out.is_contiguous():
        _ROWS[path].forward(form.x, form.attention, form.cells, form.taps, out)
        return y
    rows = torch.empty_like(out, memory_format=torch.contiguous_format)
    _ROWS[path].forward(form.x, form.attention, form.cells, form.taps, rows)
    return y.copy_(rows.movedim(-1, 1))


def backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    path: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of (x, α, E), each in its tensor's type and empty where not needed.

    Args:
        gradient: of the output, [batch, out_channels, *output_size].
        x, attention, cells, path: as in `forward`.
    """
    mixed = attention.to(x.dtype).contiguous(), cells.to(x.dtype).contiguous()
    if _reads_nothing(x, gradient.shape, convolution):
        found = Gradients(torch.zeros_like(x), torch.zeros_like(attention), torch.zeros_like(cells))
    elif path in _NATIVE:
        found = new_gradients(_mapped(x), *mixed, needed)
        native.backward(_mapped(gradient), _mapped(x), *mixed, convolution, found, _NATIVE[path])
    elif path in _CALLS:
        found = new_gradients(x, *mixed, needed)
        convolutions.backward(gradient, x, *mixed, convolution, found, _CALLS[path])
    else:
        found = _rows_backward(gradient, x, *mixed, convolution, path, needed)
    wanted = zip((found.x, found.attention, found.cells), (x, attention, cells), needed, strict=True)
    return [new.to(old.dtype) if need and new is not None else old.new_empty(0) for new, old, need in wanted]


def _rows_backward(
    gradient: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    convolution: Convolution,
    path: str,
    needed: Sequence[bool],
) -> Gradients:
    form = _Rows(x, attention, cells, convolution, path)
    rows = gradient.movedim(1, -1)
    found = new_gradients(form.x, form.attention, form.cells, needed)
    _ROWS[path].backward(
        rows if form.direct else rows.contiguous(), form.x, form.attention, form.cells, form.taps, found
    )
    return Gradients(
        None if found.x is None else form.put_back(found.x, x),
        None if found.attention is None else form.put_back_attention(found.attention, attention),
        None if found.cells is None else found.cells.view(cells.shape),
    )


class _Rows:
    """A convolution as the paths of matrix products see it: channels last, one kernel position a cell, live taps only.

    Where cells span the whole kernel, every output position's patch of the input becomes one wide pixel of a 1×1
    convolution.

    Attributes:
        x: [batch, *size, in_channels].
        attention: α [batch, positions, output groups, input groups, cells].
        cells: E [cells, co, ci].
        taps: one a position.
        live: those positions among all.
        direct: x is the caller's memory, whatever its format: the path needs no copies.
    """

    def __init__(self, x: Tensor, attention: Tensor, cells: Tensor, convolution: Convolution, path: str) -> None:
        rows = x.movedim(1, -1)
        self.grid = convolution.grid
        self.read = find_taps(convolution, tuple(x.shape[2:]))
        self.patches = math.prod(convolution.cell_shape[2:]) > 1
        self.direct = path == "products" and len(self.read.taps) == 1 and not self.patches
        self.cells = cells.flatten(2).contiguous() if self.patches else cells.reshape(cells.shape[:3])
        if self.patches:
            self.taps = identity(self.read.output_size)
            self.live: tuple[int, ...] = (0,)
            self.x = self._patches(rows)
        else:
            self.taps, self.live = self.read, self.read.live
            self.x = rows if self.direct else rows.contiguous()
        alpha = self.split(attention)
        self.attention = take(alpha, self.live)

    def split(self, attention: Tensor) -> Tensor:
        """Return α [batch, mixtures, cells] by position, output group and input group."""
        spatial, out_groups, in_groups = self.grid
        return attention.view(len(attention), math.prod(spatial), out_groups, in_groups, -1)

    def put_back(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of the input [batch, in_channels, *size] from that of `x`."""
        if not self.patches:
            gradient = gradient.movedim(-1, 1)
            return gradient if self.direct or _channels_last(x) else gradient.contiguous()
        total = torch.zeros_like(x)
        gradient = gradient.unflatten(-1, (x.shape[1], -1))
        for tap, position in zip(self.read.taps, self.read.live, strict=True):
            self.read.add_back(gradient[..., position], tap, total.movedim(1, -1))
        return total

    def put_back_attention(self, gradient: Tensor, attention: Tensor) -> Tensor:
        """Return the gradient of α [batch, mixtures, cells] from that of the live positions."""
        if gradient.numel() == attention.numel():
            return gradient.reshape(attention.shape)
        total = gradient.new_zeros(attention.shape)
        put(self.split(total), self.live, gradient)
        return total

    def _patches(self, rows: Tensor) -> Tensor:
        channels = rows.shape[-1]
        positions = self.cells.shape[2] // (channels // self.grid[2])
        patches = rows.new_zeros(len(rows), *self.read.output_size, channels, positions)
        for tap, position in zip(self.read.taps, self.read.live, strict=True):
            self.read.read(rows, tap, patches[..., position])
        return patches.flatten(-2)


def _is_depthwise(convolution: Convolution) -> bool:
    """Return whether every one of several channels is convolved by itself, to one channel; of one channel all are."""
    return convolution.kernel_shape[0] == convolution.groups > 1 == convolution.kernel_shape[1]


def _reads_nothing(x: Tensor, output_shape: torch.Size, convolution: Convolution) -> bool:
    """Return whether there is nothing to compute: an empty input or output, **or** one that reads only padding."""
    return 0 in x.shape or 0 in output_shape or not find_taps(convolution, tuple(x.shape[2:])).taps


def _mapped(x: Tensor) -> Tensor:
    """Return x with its channels first or last in memory, as the compiled passes take it: a copy if need be."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def _channels_last(x: Tensor) -> bool:
    """Return whether x [batch, channels, *size] has its channels last in memory, and not first as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
