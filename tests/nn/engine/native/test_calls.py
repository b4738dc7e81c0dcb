"""The compiled passes against the literal form: output and all gradients, over geometries, layouts and threads."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kw_lightning.nn.engine import Convolution, native, reference, workspace
from kw_lightning.nn.engine.epilogue import Epilogue, Norm
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.native import blocking, forms, library, positions
from kw_lightning.nn.engine.taps import find_taps

sys.path.insert(0, str(Path(__file__).parents[1]))

from geometries import suited

FORMS = {
    "mix_kernels": native.MIX_KERNELS,
    "winograd": native.WINOGRAD,
    "mix_inputs": native.MIX_INPUTS,
    "depthwise": native.DEPTHWISE,
    "by_group": native.MIX_KERNELS,
}
# Relative to the largest number of each result; Winograd's sums of sums lose a digit.
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")


@pytest.fixture(params=["wide", "narrow"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compile for vectors of 16 and of 8 numbers, whichever this machine has; compilers split what is too wide."""
    flags = (*library.FLAGS, f"-DWIDTH={16 if request.param == 'wide' else 8}", "-O1")  # compiling fast, not running
    monkeypatch.setattr(library, "FLAGS", flags)
    clear_caches()
    yield request.param
    clear_caches()


def clear_caches() -> None:
    library.find.cache_clear()
    forms.describe.cache_clear()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    form: str, convolution: Convolution, size: tuple[int, ...], batch: int, cells: int, *, last: bool = False
) -> None:
    """Compare with the literal form in float64."""
    generator = torch.Generator().manual_seed(0)
    mixtures = math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)
    x = torch.randn(batch, convolution.kernel_shape[1] * convolution.groups, *size, generator=generator)
    attention = torch.randn(batch, mixtures, cells, generator=generator)
    stored = torch.randn(cells, *convolution.cell_shape, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (x, attention, stored)]
    expected = reference.convolve(*exact, convolution)
    gradient = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    x, gradient, y = (in_memory(t, last) for t in (x, gradient, torch.full(expected.shape, torch.nan)))
    native.forward(x, attention, stored, convolution, y, FORMS[form])
    found = Gradients(torch.full_like(x, torch.nan), torch.zeros_like(attention), torch.full_like(stored, torch.nan))
    native.backward(gradient, x, attention, stored, convolution, found, FORMS[form])
    results = (y, found.x, found.attention, found.cells)
    for name, one, other in zip(("y", "x", "α", "E"), results, (expected, *wanted), strict=True):
        assert one is not None
        largest = other.abs().max().clamp_min(1e-3)
        assert (one.double() - other).abs().max() < TOLERANCE * largest, (form, name)
    ones, added = torch.ones(y.shape[1]), in_memory(torch.randn(y.shape, generator=generator), last)
    epilogue = Epilogue(norm=Norm(0.25 * ones, 3 * ones, ones, 0.5 * ones, 1.0), added=added, activation="relu6")
    native.forward(x, attention, stored, convolution, y, FORMS[form], epilogue)
    assert (y - ((expected - 0.25) / 2 + 0.5 + added).clamp(0, 6)).abs().max() < TOLERANCE * expected.abs().max()


def in_memory(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, Convolution, tuple[int, ...], int, int]:
    """Draw (form, geometry, input size, batch, cells)."""
    form = draw(st.sampled_from(list(FORMS)))
    dimensions = draw(st.integers(1, 3 if form != "winograd" else 2))

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    plain = (1,) * dimensions
    kernel, stride, dilation = (3,) * dimensions, plain, plain
    if form != "winograd":
        kernel, stride, dilation = sides(1, 3), sides(1, 3), sides(1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    co, ci = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    geometry = Convolution(
        (co * draw(st.integers(1, 3)), ci * draw(st.integers(1, 3)), *kernel),
        (co, ci, *plain),
        stride,
        padding,
        dilation,
    )
    geometry = suited(form, geometry)
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(max(n, 1) + draw(st.integers(0, 6)) for n in least)
    assume(find_taps(geometry, size).taps)  # where all is padding, no pass is called
    return form, geometry, size, draw(st.integers(1, 5)), draw(st.integers(1, 40))


@settings(max_examples=120)
@given(problems(), st.booleans(), st.integers(1, 3))
def test_every_form_equals_the_literal_form(
    problem: tuple[str, Convolution, tuple[int, ...], int, int], last: bool, count: int
) -> None:
    with threads(count):
        compare(*problem, last=last)


# (kernel, stride, padding, dilation, size) of depthwise convolutions, whose lines are walked a channel at a time.
LONG_LINES = {
    "3 × 3": ((3, 3), (1, 1), (1, 1), (1, 1), (9, 56)),
    "a line that is no multiple of a vector": ((3, 3), (1, 1), (1, 0), (1, 1), (5, 67)),
    "a stride of 2": ((3, 5), (2, 2), (1, 2), (1, 1), (11, 113)),
    "a stride of 2, an odd padding and dilation": ((2, 4), (1, 2), (1, 3), (2, 2), (6, 120)),
    "a stride of 2 that leaves positions unread": ((1, 1), (2, 2), (0, 0), (1, 1), (5, 98)),
    "a stride of 3": ((3, 3), (3, 3), (1, 1), (1, 1), (7, 150)),
    "lines of 9 taps": ((3, 9), (1, 1), (1, 4), (1, 1), (10, 49)),
    "several strips": ((3, 3), (1, 1), (1, 1), (1, 1), (150, 150)),
    "one dimension": ((5,), (2,), (2,), (1,), (301,)),
    "three dimensions": ((3, 2, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), (4, 5, 50)),
}


@pytest.mark.parametrize("case", LONG_LINES)
@pytest.mark.parametrize(("channels", "cell"), [(40, 40), (6, 2)])
def test_depthwise_convolutions_of_long_lines_equal_the_literal_form(
    vectors: str, case: str, channels: int, cell: int
) -> None:
    kernel, stride, padding, dilation, size = LONG_LINES[case]
    ones = (1,) * len(kernel)
    convolution = Convolution((channels, 1, *kernel), (cell, 1, *ones), stride, padding, dilation, channels)
    for count in (1, 3):
        with threads(count):
            compare("depthwise", convolution, size, 2, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", [(16, 16), (20, 24), (72, 36), (64, 64)])
def test_both_widths_of_vectors_equal_the_literal_form(vectors: str, form: str, cell: tuple[int, int]) -> None:
    loaded = library.library()
    assert loaded is not None
    assert loaded.kw_lanes() == (32 if vectors == "wide" else 16)
    co, ci = cell
    geometry = Convolution((co * 2, ci * 2, 3, 3), (*cell, 1, 1), (1, 1), (1, 1), (1, 1))
    compare(form, suited(form, geometry), (7, 9), 3, 37)


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize(
    ("groups", "channels", "cell"),
    [
        (4, (8, 8), (32, 8)),  # spans all
        (4, (8, 8), (16, 4)),  # spans two, and half of their inputs
        (3, (20, 24), (20, 12)),
        (3, (24, 20), (8, 20)),  # a third of one
        (6, (4, 2), (2, 1)),
        (6, (3, 7), (9, 7)),
    ],
)
def test_cells_span_groups_or_are_part_of_one(
    groups: int, channels: tuple[int, int], cell: tuple[int, int], batch: int
) -> None:
    outputs, inputs = channels
    with threads(2):
        kernel = (groups * outputs, inputs, 3, 3)
        compare("by_group", Convolution(kernel, (*cell, 1, 1), (2, 1), (1, 1), (1, 1), groups), (5, 4), batch, 11)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "channels", "cell", "size", "stride", "dilation", "batch"),
    [
        ((7, 7), 3, 3, (7, 7), (1, 1), (1, 1), 33),
        ((5, 5), 17, 17, (14, 9), (1, 1), (1, 1), 2),  # lanes for one block and a bit
        ((5, 7), 170, 170, (9, 8), (2, 2), (1, 1), 1),  # more blocks than are read together
        ((3, 3), 48, 24, (11, 13), (3, 1), (2, 2), 2),  # groups of lanes
        ((5, 5), 20, 20, (3, 2), (1, 2), (1, 1), 3),  # a map smaller than the kernel
        ((3, 3), 288, 32, (6, 7), (1, 1), (1, 1), 2),  # groups side by side
        ((9,), 33, 11, (30,), (2,), (1,), 2),  # more taps than a tile takes
        ((2, 3, 5), 18, 9, (4, 5, 6), (1, 2, 3), (1, 1, 1), 2),
        ((5, 5), 16, 16, (1, 1), (2, 2), (1, 1), 2),  # of five taps every other one reads, see test_walks.py
    ],
)
def test_depthwise_convolutions_walk_any_map_strip_by_strip(
    kernel: tuple[int, ...],
    channels: int,
    cell: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    batch: int,
    last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padding = tuple(k - 1 if n == 1 else d * k // 2 for k, d, n in zip(kernel, dilation, size, strict=True))
    shape, ones = (channels, 1, *kernel), (1,) * (1 + len(kernel))
    geometry = Convolution(shape, (cell, *ones), stride, padding, dilation, channels)
    for strip, count in ((1, 1), (1, 5), (forms.STRIP_BYTES, 2)):
        monkeypatch.setattr(forms, "STRIP_BYTES", strip)
        forms.describe.cache_clear()
        with threads(count):
            compare("depthwise", geometry, size, batch, 11, last=last)
    forms.describe.cache_clear()


@pytest.mark.parametrize("form", ["mix_kernels", "winograd", "by_group"])
@pytest.mark.parametrize("cell", [(32, 32), (20, 24), (8, 96), (40, 8)])
def test_few_kernels_of_many_cells_equal_the_literal_form(vectors: str, form: str, cell: tuple[int, int]) -> None:
    geometry = suited(form, Convolution((cell[0], cell[1] * 2, 3, 3), (*cell, 1, 1), (1, 1), (1, 1), (1, 1)))
    compare(form, geometry, (5, 6), 1, 200)
    arguments = forms.describe(geometry, (5, 6), 1, 200, 0, FORMS[form], False, torch.get_num_threads(), 6 * 2**20)[1]
    assert arguments.direct
    assert arguments.vectors == (1 if cell[0] <= library.find().library.kw_lanes() // 2 else 2)


@pytest.mark.parametrize("form", FORMS)
def test_small_bounds_of_memory_change_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Convolution((40, 48, 3, 3), (20, 24, 1, 1), (1, 1), (1, 1), (1, 1))
    for name in ("BLOCK_BYTES", "KERNEL_BYTES", "MAP_BYTES"):
        monkeypatch.setattr(blocking, name, 1)
    with workspace(1):
        compare(form, suited(form, geometry), (6, 5), 5, 7)
    forms.describe.cache_clear()


@pytest.mark.parametrize("form", ["mix_kernels", "winograd", "by_group"])
@pytest.mark.parametrize("together", [1, 2**30])
def test_kernels_mixed_of_all_blocks_before_they_are_used_equal_the_literal_form(
    vectors: str, form: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BLOCK_BYTES", 1), ("PACKED_AGAIN", 0), ("MAP_BYTES", together)):
        monkeypatch.setattr(blocking, name, value)
    geometry, size = suited(form, Convolution((40, 88, 3, 3), (40, 44, 1, 1), (1, 1), (1, 1), (1, 1))), (23, 24)
    for count in (1, 2):
        with threads(count):
            compare(form, geometry, size, 5, 7)
            for backward in (False, True):
                told = forms.describe(geometry, size, 5, 7, 0, FORMS[form], backward, count, 6 * 2**20)[1]
                assert told.block_depths < told.kernel_depths == told.depths
    forms.describe.cache_clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_threads_share_lanes_and_samples(form: str, count: int) -> None:
    with threads(count):
        geometry = Convolution((24, 40, 3, 3), (24, 40, 1, 1), (1, 1), (1, 1), (1, 1))
        compare(form, suited(form, geometry), (5, 5), 6, 9)


@pytest.mark.parametrize("form", FORMS)
def test_one_thread_adds_to_the_gradient_of_alpha_where_cells_fill_vectors(form: str) -> None:
    with threads(1):
        geometry = Convolution((24, 40, 3, 3), (24, 40, 1, 1), (1, 1), (1, 1), (1, 1))
        compare(form, suited(form, geometry), (5, 5), 6, 32)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_twice(form: str) -> None:
    geometry = suited(form, Convolution((24, 40, 3, 3), (24, 40, 1, 1), (1, 1), (1, 1), (1, 1)))
    torch.manual_seed(0)
    channels = geometry.kernel_shape[1] * geometry.groups
    mixtures = math.prod(geometry.kernel_shape) // math.prod(geometry.cell_shape)
    x, attention, cells = (torch.randn(s) for s in ((6, channels, 5, 5), (6, mixtures, 9), (9, *geometry.cell_shape)))
    gradient = torch.randn(6, geometry.kernel_shape[0], 5, 5)
    results = []
    for _ in range(2):
        y = torch.empty_like(gradient)
        native.forward(x, attention, cells, geometry, y, FORMS[form])
        found = Gradients(torch.empty_like(x), torch.zeros_like(attention), torch.empty_like(cells))
        native.backward(gradient, x, attention, cells, geometry, found, FORMS[form])
        results.append((y, found.x, found.attention, found.cells))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_tables_read_every_position_that_a_tap_does() -> None:
    geometry = Convolution((4, 4, 3, 3), (4, 4, 1, 1), (2, 1), (1, 1), (1, 2))
    found = positions.find_positions(geometry, (6, 7), 6, winograd=False)
    ones = torch.ones(1, 1, 6, 7)
    count = torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3), None, (2, 1), (1, 1), (1, 2))
    assert (found.reads >= 0).sum(0).tolist() == count.flatten().int().tolist()
    # Each tile once, and in the runs of the kernels' gradient the same pairs.
    places = [
        p for start in found.forward.tile_start for p in found.forward.tile[start + 2 :][: found.forward.tile[start]]
    ]
    assert sorted(map(int, places)) == list(range(found.outputs))
    assert int(found.run.view(-1, 4)[:, 3].sum()) == int((found.reads >= 0).sum())
