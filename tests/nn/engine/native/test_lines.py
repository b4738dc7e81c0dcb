"""The pass that mixes kernels of one position line by line: all sizes, layouts, epilogues and ways to cut the work."""

from __future__ import annotations

import itertools

import pytest
import torch

from kw_lightning.nn.engine import Convolution, computing, native, reference, workspace
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.native import blocking, forms
from kw_lightning.nn.engine.native.blocking import Blocking, Extents, block_lines
from kw_lightning.nn.engine.paths import find_path
from kw_lightning.nn.engine.planner import rank
from kw_lightning.nn.engine.problem import Problem

PATH = find_path("mix_kernels/pointwise")
# ResNet50's second stage, 512 to 128 channels of 28×28, 8 samples.
REDUCE = Extents(8, 4, 104, 128, 128, 1, 4, 784, 784, 2, 16, 6 * 2**20)

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C compiler")


def compare(
    batch: int, cell: tuple[int, int], groups: tuple[int, int], size: int, cells: int = 5, **options: int
) -> None:
    """Compare one problem with the literal form, channels first and last."""
    torch.manual_seed(0)
    stride, padding = options.get("stride", 1), options.get("padding", 0)
    shape = (cell[0] * groups[0], cell[1] * groups[1], 1)
    convolution = Convolution(shape, (*cell, 1), (stride,), (padding,), (1,), 1)
    x, e = torch.randn(batch, shape[1], size), torch.randn(cells, *cell, 1)
    attention = torch.randn(batch, groups[0] * groups[1], cells)
    expected = reference.convolve(x, attention, e, convolution)
    for source in (x, x.movedim(1, 2).contiguous().movedim(2, 1)):
        found = torch.full_like(expected, float("nan"))
        native.forward(source, attention, e, convolution, found, native.MIX_LINES)
        last = torch.full_like(expected.movedim(1, 2), float("nan")).contiguous().movedim(2, 1)
        native.forward(source, attention, e, convolution, last, native.MIX_LINES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


def last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def compare_gradients(batch: int, cell: tuple[int, int], groups: tuple[int, int], size: int, cells: int = 5) -> None:
    """Compare every gradient with the literal form's, of maps in both layouts, alone and added to others."""
    torch.manual_seed(0)
    shape = (cell[0] * groups[0], cell[1] * groups[1], 1)
    convolution = Convolution(shape, (*cell, 1), (1,), (0,), (1,), 1)
    x, e = torch.randn(batch, shape[1], size).requires_grad_(), torch.randn(cells, *cell, 1).requires_grad_()
    attention = torch.randn(batch, groups[0] * groups[1], cells).requires_grad_()
    y = reference.convolve(x, attention, e, convolution)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, attention, e), gradient)
    inputs = [tensor.detach() for tensor in (x, attention, e)]
    for laid, lies, (of_x, of_kernels, adds) in itertools.product(
        (gradient, last(gradient)),
        (inputs[0], last(inputs[0])),
        ((True, True, False), (True, True, True), (False, True, True), (True, False, False)),
    ):
        into = Gradients(
            torch.full_like(lies, float("nan")) if of_x else None,
            torch.zeros_like(inputs[1]) if of_kernels else None,
            torch.full_like(inputs[2], 1.0 if adds else float("nan")) if of_kernels else None,
            adds=adds,
        )
        native.backward(laid, lies, *inputs[1:], convolution, into, native.MIX_LINES)
        found = into.x, into.attention, into.cells if into.cells is None else into.cells - float(adds)
        for one, other in zip(found, expected, strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=float(other.abs().max()) * 1e-5)


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 49, 64, 65, 200])
def test_maps_of_every_size_are_computed_whole(size: int) -> None:
    compare(2, (8, 24), (2, 3), size)


@pytest.mark.parametrize("size", [1, 7, 17, 31, 32, 49, 65, 287, 288, 385])
def test_gradients_of_maps_of_every_size_are_whole(size: int) -> None:
    compare_gradients(2, (8, 24), (2, 3), size)


@pytest.mark.parametrize("cell", [(1, 32), (8, 12), (16, 6), (300, 32), (32, 40), (3, 64), (48, 2)])
def test_gradients_of_cells_of_whole_vectors_are_found(cell: tuple[int, int]) -> None:
    compare_gradients(3, cell, (2, 2), 37)


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_gradients_of_batches_of_every_size_are_found(batch: int) -> None:
    compare_gradients(batch, (16, 32), (2, 2), 20, cells=19)


@pytest.mark.parametrize("cell", [(1, 1), (3, 5), (6, 9), (13, 16), (7, 17), (20, 33), (4, 300)])
def test_cells_may_have_any_channels(cell: tuple[int, int]) -> None:
    compare(3, cell, (1, 2), 21)


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_batches_of_every_size_give_the_literal_form(batch: int) -> None:
    compare(batch, (16, 8), (2, 2), 20, cells=19)


def test_strides_and_padding_are_read_as_they_are() -> None:
    for stride, padding in itertools.product((1, 2, 3), (0, 2)):
        compare(2, (8, 8), (2, 1), 19, stride=stride, padding=padding)


def test_the_work_may_be_cut_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for bound, own, count in itertools.product((1, 2**14), (1, 10**6), (1, 2, 3)):
        monkeypatch.setattr(blocking, "LINE_BYTES", bound)
        monkeypatch.setattr(blocking, "BLOCK_BYTES", bound)
        monkeypatch.setattr(blocking, "MAP_BYTES", bound)
        monkeypatch.setattr(blocking, "OWN_LINES", own)
        monkeypatch.setattr(blocking, "SHARED_BYTES", bound)
        torch.set_num_threads(count)
        try:
            forms.describe.cache_clear()
            compare(7, (14, 40), (2, 2), 70)
            compare_gradients(5, (16, 40), (2, 2), 70)
            with workspace(1):
                compare(5, (14, 40), (2, 1), 18)
                compare_gradients(5, (16, 40), (2, 1), 18)
        finally:
            torch.set_num_threads(threads)
            forms.describe.cache_clear()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", ["relu6", "silu", None])
def test_lines_are_finished_where_they_are_written(activation: str | None, last: bool) -> None:
    torch.manual_seed(0)
    convolution = Convolution((40, 24, 1, 1), (20, 12, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, attention, e = torch.randn(2, 24, 5, 7), torch.randn(2, 4, 6), torch.randn(6, 20, 12, 1, 1)
    added, bias = torch.randn(2, 40, 5, 7), torch.randn(40)
    if last:
        added = added.to(memory_format=torch.channels_last)
    epilogue = Epilogue(bias=bias, added=added, activation=activation)
    found = computing.forward(x, attention, e, convolution, PATH, epilogue)
    expected = epilogue.apply(reference.convolve(x, attention, e, convolution))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_lines_are_cut_as_the_formulas_say() -> None:
    # 3 MiB hold 192 lines of 8 samples of 4 kernels by 128 depths: 2 blocks for 2 threads, each with its own panels.
    assert block_lines(REDUCE, backward=False) == Blocking(128, 8, 0, 1, lines=64)
    # Of one thread and a quarter of the lines, panels are shared where blocks are small.
    assert block_lines(REDUCE._replace(lanes=32), backward=False).read == 8
    # Few lines are not cut further: the samples are.
    assert block_lines(REDUCE._replace(lanes=8), backward=False).parts == 2
    # 160 KiB hold 40 depths of 1000 cells, 32 in whole vectors.
    assert block_lines(REDUCE._replace(cells=1000), backward=False).depths == 32
    # Backwards 6 MiB hold the kernels of 24 samples, 4 MiB the maps of 2, and 80 KiB 192 numbers of 104 cells.
    back = REDUCE._replace(batch=32, lane_groups=4, depth_groups=1)
    assert block_lines(back, backward=True) == Blocking(192, 24, 2, 1)
    assert block_lines(back._replace(batch=1), backward=True) == Blocking(192, 1, 1, 1)


def test_a_stride_lays_out_the_source_once_for_all_blocks() -> None:
    # ResNet50's last downsampling, 1024 to 2048 channels, 14² to 7²: in blocks of many lines, that else read for
    # themselves; the samples that are held are those of the positions that are read.
    skipping = Extents(8, 8, 47, 512, 512, 4, 2, 196, 49, 2, 16, 6 * 2**20)
    assert block_lines(skipping._replace(source_positions=49), backward=False).read == 0
    assert block_lines(skipping, backward=False).read == 8


def test_gradients_take_it_where_maps_have_the_numbers() -> None:
    def form_of(batch: int, side: int, cell: tuple[int, int] = (32, 32), *, stride: int = 1) -> native.Form:
        convolution = Convolution((96, 64, 1, 1), (*cell, 1, 1), (stride,) * 2, (0, 0), (1, 1), 1)
        x, cells = torch.empty(batch, 64, side, side), torch.empty(60, *cell, 1, 1)
        for path in (PATH, find_path("mix_kernels/compiled")):
            form = path.form_of(x, cells, convolution, backward=True)
        return form

    assert form_of(8, 14) is native.MIX_LINES
    assert form_of(1, 14) is native.MIX_ROWS  # cells have twice the numbers of both maps
    assert form_of(8, 11) is native.MIX_KERNELS  # of fewer positions many lanes are empty
    assert form_of(8, 14, (3, 4)) is native.MIX_KERNELS  # no whole vectors
    assert form_of(8, 14, stride=2) is native.MIX_KERNELS


def test_it_is_chosen_for_batches_and_not_for_few_kernels_of_far_cells() -> None:
    convolution = Convolution((128, 512, 1, 1), (128, 128, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    problem = Problem(convolution, 8, (28, 28), 104, torch.float32, torch.device("cpu"))
    assert rank(problem, "mix_kernels")[0].name == PATH.name
    assert rank(problem._replace(batch=1), "mix_kernels")[0].name == "mix_kernels/compiled"
    assert rank(problem._replace(backward=True), "mix_kernels")[0].name == "mix_kernels/compiled"
    # On ResNet50's smallest maps as well, where it takes 0.85 of the other's time; not on maps of one position, 1.6.
    last = Convolution((512, 2048, 1, 1), (512, 512, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    problem = problem._replace(convolution=last, size=(7, 7), cells=47)
    assert rank(problem, "mix_kernels")[0].name == PATH.name
    assert rank(problem._replace(batch=64, size=(1, 1)), "mix_kernels")[0].name == "mix_kernels/compiled"
