"""The pass that mixes kernels as cells lie, between maps whose channels are last: sizes, layouts, cutting the work."""

from __future__ import annotations

import itertools

import pytest
import torch

from kw_lightning.nn.engine import Convolution, computing, native, reference, workspace
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.native import blocking, forms
from kw_lightning.nn.engine.native.blocking import Blocking, Extents, block_rows
from kw_lightning.nn.engine.paths import find_path
from kw_lightning.nn.engine.paths.compiled import CompiledPath

# ConvNeXt's third stage, 384 to 1536 channels of 14×14, 4 samples; and back.
EXPAND = Extents(4, 4, 72, 384, 384, 4, 1, 196, 196, 2, 16, 6 * 2**20)
SHRINK = EXPAND._replace(lane_groups=1, depth_groups=4)

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler")


def last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def compare(
    batch: int, out_channels: int, groups: tuple[int, int], size: int, cells: int = 5, in_channels: int = 32
) -> None:
    """Compare one problem with the literal form, forward and every gradient, of maps in both layouts."""
    torch.manual_seed(0)
    shape = (out_channels * groups[0], in_channels * groups[1], 1)
    convolution = Convolution(shape, (out_channels, in_channels, 1), (1,), (0,), (1,), 1)
    x = last(torch.randn(batch, shape[1], size)).requires_grad_()
    e = torch.randn(cells, out_channels, in_channels, 1).requires_grad_()
    attention = torch.randn(batch, groups[0] * groups[1], cells).requires_grad_()
    expected = reference.convolve(x, attention, e, convolution)
    inputs = [tensor.detach() for tensor in (x, attention, e)]
    found = last(torch.full_like(expected, float("nan")))
    native.forward(*inputs, convolution, found, native.MIX_ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, attention, e), gradient)
    scale = [tensor.abs().max() * 1e-5 if tensor.numel() else 1.0 for tensor in gradients]
    first = inputs[0].contiguous()
    cases = (
        (gradient, inputs[0], False, True, True),
        (last(gradient), first, False, True, True),
        (last(gradient), inputs[0], True, True, False),
        (gradient, first, True, True, False),
        (gradient, inputs[0], True, False, True),
    )
    for laid, read, adds, of_x, of_e in cases:
        start = torch.ones_like(gradients[2]) if adds else torch.full_like(gradients[2], float("nan"))
        into = Gradients(
            torch.full_like(read, float("nan")) if of_x else None,
            torch.zeros_like(inputs[1]),
            start.clone() if of_e else None,
            adds=adds,
        )
        native.backward(laid, read, *inputs[1:], convolution, into, native.MIX_ROWS)
        assert into.attention is not None
        torch.testing.assert_close(into.attention, gradients[1], rtol=1e-4, atol=float(scale[1]))
        if into.x is not None:
            torch.testing.assert_close(into.x, gradients[0], rtol=1e-4, atol=float(scale[0]))
        if into.cells is not None:
            torch.testing.assert_close(into.cells - float(adds), gradients[2], rtol=1e-4, atol=float(scale[2]))


@pytest.mark.parametrize("size", [2, 7, 49, 97, 200, 385])
def test_maps_of_every_size_are_computed_whole(size: int) -> None:
    compare(2, 24, (2, 3), size)


@pytest.mark.parametrize("out_channels", [1, 3, 6, 16, 33, 70])
def test_cells_may_have_any_output_channels(out_channels: int) -> None:
    compare(3, out_channels, (1, 2), 21)


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_batches_of_every_size_give_the_literal_form(batch: int) -> None:
    compare(batch, 16, (2, 2), 20, cells=19)


def test_the_work_may_be_cut_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for bound, terms, count in itertools.product((1, 2**14), (1, 24), (1, 2, 3)):
        for name in ("PART_BYTES", "BLOCK_BYTES", "MAP_BYTES"):
            monkeypatch.setattr(blocking, name, bound)
        monkeypatch.setattr(blocking, "LEAST_TERMS", terms)
        torch.set_num_threads(count)
        try:
            forms.describe.cache_clear()
            compare(5, 46, (2, 2), 70, in_channels=96)
            with workspace(1):
                compare(3, 40, (2, 1), 18)
        finally:
            torch.set_num_threads(threads)
            forms.describe.cache_clear()


@pytest.mark.parametrize("name", ["mix_kernels/pointwise", "mix_kernels/compiled"])
def test_maps_take_it_where_kernels_are_few_or_maps_large(name: str) -> None:
    def takes(batch: int, side: int, *, channels: int = 64, forward: bool = False, first: bool = False) -> bool:
        convolution = Convolution((2 * channels, channels, 1, 1), (channels, channels, 1, 1), (1, 1), (0, 0), (1, 1), 1)
        x, cells = last(torch.empty(batch, channels, side, side)), torch.empty(12, channels, channels, 1, 1)
        path = find_path(name)
        assert isinstance(path, CompiledPath)
        x = x.contiguous() if first else x
        return path.form_of(x, cells, convolution, backward=not forward) is native.MIX_ROWS

    assert takes(24, 7)
    assert not takes(25, 14)  # 50 kernels
    assert not takes(4, 7, channels=40)  # no whole vectors
    assert takes(6, 7, forward=True) == (name == "mix_kernels/pointwise")
    assert not takes(7, 14, forward=True)  # 14 kernels to turn, of 12 cells
    assert takes(7, 32, forward=True) == (name == "mix_kernels/pointwise")
    assert takes(3, 7, first=True)  # maps are turned, of which cells have 1.7 times the numbers
    assert not takes(4, 7, first=True)
    assert not takes(3, 7, first=True, forward=True)


def test_rows_are_finished_where_they_are_written() -> None:
    torch.manual_seed(0)
    convolution = Convolution((40, 64, 1, 1), (20, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, attention, e = last(torch.randn(2, 64, 15, 7)), torch.randn(2, 4, 9), torch.randn(9, 20, 32, 1, 1)
    for added in (torch.randn(2, 40, 15, 7), last(torch.randn(2, 40, 15, 7)), None):
        epilogue = Epilogue(bias=torch.randn(40), added=added, activation="silu")
        path = find_path("mix_kernels/pointwise")
        assert path is not None
        found = computing.forward(x, attention, e, convolution, path, epilogue)
        expected = epilogue.apply(reference.convolve(x, attention, e, convolution))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_are_cut_as_the_formulas_say() -> None:
    # 80 KiB hold 284 numbers of 72 cells, in whole vectors 272; 1.5 MiB hold 64 lines of 16 kernels, and 192 KiB 192
    # columns of 16 of them.
    assert block_rows(EXPAND, backward=False) == Blocking(192, 4, 4, 1, lines=64)
    # Of 24 cells as many as are mixed at a time, 512, would be held, but of 8 kernels' lines 384.
    assert block_rows(EXPAND._replace(cells=24, batch=2), backward=False).depths == 384
    # Back, 1.5 MiB hold 14 lines of 384 columns of 72 cells, evened out to 16, of 4 groups; of one group 64 are needed.
    assert block_rows(SHRINK, backward=True) == Blocking(272, 4, 4, 1, lines=16)
    assert block_rows(EXPAND, backward=True).lines == 64
    # 6 MiB hold 64 lines of 384 columns of 4 kernels of 16 samples; 32 MiB 6 samples of 784 positions, 1536 channels.
    assert block_rows(EXPAND._replace(batch=64), backward=True).mixed == 16
    assert block_rows(EXPAND._replace(batch=64, source_positions=784), backward=True).mixed == 6
    # Fewer blocks of lines than threads: the samples are cut.
    assert block_rows(EXPAND._replace(lanes=16), backward=False).parts == 2
