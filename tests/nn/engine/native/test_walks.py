"""How depthwise convolutions go over maps: the tables of lines, phases and strips."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kw_lightning.nn.engine import Convolution
from kw_lightning.nn.engine.native.walks import Walk, find_walks


@st.composite
def problems(draw: st.DrawFn) -> tuple[Convolution, tuple[int, ...], int]:
    """Draw (geometry, input size, positions of a strip)."""

    def sides(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, dilation = sides(1, 5), sides(1, 3), sides(1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(max(n, 1) + draw(st.integers(0, 5)) for n in least)
    return Convolution((2, 1, *kernel), (1, 1, 1, 1), stride, padding, dilation, 2), size, draw(st.integers(1, 200))


def pairs(walk: Walk, live: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return what a walk multiplies: (tap, position of out, position of the source), but for the zeros."""
    found = []
    for line, (kernel_line, reads) in itertools.product(range(walk.lines), enumerate(walk.reads.tolist())):
        if reads[line] < 0:
            continue
        first, count = walk.range[line // walk.strip].tolist()
        assert first <= reads[line] < first + count <= first + walk.held
        for start, step, positions, taps, tap, tap_step, read, read_step, tap_read in walk.phase.tolist():
            for i, k in itertools.product(range(positions), range(taps)):
                place = read + i * read_step + k * tap_read
                assert 0 <= place < walk.room
                if 0 <= place - walk.before < walk.source:
                    index = kernel_line * walk.taps + tap + k * tap_step
                    target, source = start + i * step, place - walk.before
                    found.append((live[index], line * walk.out + target, reads[line] * walk.source + source))
    return sorted(found)


@settings(max_examples=30)
@given(problems())
def test_walks_meet_every_pair_of_positions_once_either_way(problem: tuple[Convolution, tuple[int, ...], int]) -> None:
    convolution, size, strip = problem
    heights, widths = (range(n) for n in size)
    output_heights, output_widths = (range(n) for n in convolution.output_size(size))
    (kernel_height, kernel_width), (down, right) = convolution.kernel_shape[2:], convolution.stride
    wanted = []
    for y, x, i, j in itertools.product(output_heights, output_widths, range(kernel_height), range(kernel_width)):
        row = y * down + i * convolution.dilation[0] - convolution.padding[0]
        column = x * right + j * convolution.dilation[1] - convolution.padding[1]
        if row in heights and column in widths:
            out, source = y * len(output_widths) + x, row * len(widths) + column
            wanted.append((i * kernel_width + j, out, source))
    if not wanted:  # no pass is called
        return
    walks = find_walks(convolution, size, strip)
    assert pairs(walks.forward, walks.live) == sorted(wanted)
    assert [(tap, out, source) for tap, source, out in pairs(walks.backward, walks.live)] == sorted(
        wanted, key=lambda pair: (pair[0], pair[2], pair[1])
    )


def test_taps_between_such_as_read_something_are_taken_though_they_read_nothing() -> None:
    convolution = Convolution((2, 1, 5), (1, 1, 1), (2,), (4,), (1,), 2)
    walks = find_walks(convolution, (1,), 100)
    assert walks.live == (0, 1, 2, 3, 4)
    assert pairs(walks.forward, walks.live) == [(0, 2, 0), (2, 1, 0), (4, 0, 0)]
    assert find_walks(convolution, (2,), 100).live == (0, 1, 2, 3, 4)
    # On a map of one position only the middle of a kernel reads anything.
    small = Convolution((2, 1, 7, 7), (1, 1, 1, 1), (1, 1), (3, 3), (1, 1), 2)
    assert find_walks(small, (1, 1), 100).live == (24,)


@pytest.mark.parametrize(("positions", "strip", "held"), [(10**6, 56, 56), (62 * 24 + 56 * 18, 14, 20), (1, 1, 7)])
def test_a_strip_is_the_most_lines_that_fit_cut_evenly(positions: int, strip: int, held: int) -> None:
    convolution = Convolution((96, 1, 7, 7), (96, 1, 1, 1), (1, 1), (3, 3), (1, 1), 96)
    walk = find_walks(convolution, (56, 56), positions).forward
    assert (walk.strip, walk.held, walk.room) == (strip, held, 62)
