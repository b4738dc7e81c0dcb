"""Geometry: cells cover kernels, budgets give the cells they say, every mixture gets its start."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kw_lightning.nn.partition import PartitionError, common_cell_shape, partition

KERNELS = st.lists(
    st.tuples(*[st.sampled_from([8, 16, 24, 32, 48])] * 2, *[st.integers(1, 5)] * 2), min_size=1, max_size=5
)
BUDGETS = st.fractions(min_value=Fraction(1, 8), max_value=4, max_denominator=8)


@given(KERNELS, BUDGETS)
def test_mixtures_cover_every_kernel_exactly(kernels: list[tuple[int, ...]], budget: Fraction) -> None:
    geometry = partition(kernels, budget)
    for kernel, layer in zip(kernels, geometry.layers, strict=True):
        assert layer.mixtures * math.prod(geometry.cell_shape) == math.prod(kernel)


@given(KERNELS, BUDGETS)
def test_cells_are_the_budget_of_all_mixtures_rounded_down_and_at_least_one(
    kernels: list[tuple[int, ...]], budget: Fraction
) -> None:
    geometry = partition(kernels, budget)
    assert geometry.cells == max(math.floor(budget * geometry.mixtures), 1)
    assert geometry.budget == Fraction(geometry.cells, geometry.mixtures)


@given(KERNELS, BUDGETS)
def test_every_initial_cell_is_a_cell_or_the_zero_cell_and_no_cell_serves_twice(
    kernels: list[tuple[int, ...]], budget: Fraction
) -> None:
    geometry = partition(kernels, budget)
    used = [cell for layer in geometry.layers for cell in layer.initial_cells if cell < geometry.cells]
    assert all(0 <= cell <= geometry.cells for layer in geometry.layers for cell in layer.initial_cells)
    assert len(used) == len(set(used)) == min(len(used), geometry.cells)


@given(KERNELS, st.integers(1, 4))
def test_a_whole_budget_starts_every_mixture_from_a_cell_of_its_own(
    kernels: list[tuple[int, ...]], budget: int
) -> None:
    geometry = partition(kernels, budget)
    starts = [cell for layer in geometry.layers for cell in layer.initial_cells]
    assert starts == list(range(0, geometry.cells, budget))
    assert [layer.first_cell for layer in geometry.layers] == [layer.initial_cells[0] for layer in geometry.layers]


def test_a_half_budget_alternates_cells_and_zero_cells_along_the_diagonal() -> None:
    geometry = partition([(8, 8, 2, 2)], Fraction(1, 2))
    assert geometry.layers[0].initial_cells == (0, 2, 2, 1)


@given(KERNELS, st.fractions(min_value=Fraction(51, 100), max_value=Fraction(99, 100), max_denominator=100))
def test_an_awkward_budget_gives_every_cell_to_a_mixture(kernels: list[tuple[int, ...]], budget: Fraction) -> None:
    geometry = partition(kernels, budget)
    starts = [cell for layer in geometry.layers for cell in layer.initial_cells if cell < geometry.cells]
    assert starts == list(range(geometry.cells))


def test_an_awkward_budget_deals_cells_evenly() -> None:
    # int(1 / (2/3)) = 1 would give the first two layers all 18 cells and the third only zero cells.
    geometry = partition([(8, 8, 3, 3)] * 3, Fraction(2, 3))
    assert [sum(cell < geometry.cells for cell in layer.initial_cells) for layer in geometry.layers] == [6, 6, 6]
    assert [layer.first_cell for layer in geometry.layers] == [0, 6, 12]


def test_a_number_of_cells_may_be_given_instead_of_a_budget() -> None:
    assert partition([(8, 8, 3, 3)] * 2, cells=7).cells == 7


def test_a_decimal_ratio_means_the_decimal_number() -> None:
    assert partition([(10, 10, 5, 2)] * 10, 0.29).cells == 29
    assert common_cell_shape([(1000, 1280)], 1, 0.025) == (1000, 32)


def test_whole_cells_keep_the_kernel_size() -> None:
    geometry = partition([(8, 16, 3, 3), (16, 16, 3, 3)], spatial="whole")
    assert geometry.cell_shape == (8, 16, 3, 3)
    assert geometry.mixtures == 3


@pytest.mark.parametrize(
    ("kernels", "options", "message"),
    [
        ([], {}, "at least one layer"),
        ([(8, 8, 3), (8, 8, 3, 3)], {}, "1-dimensional and 2-dimensional"),
        ([(8, 8, 3, 3), (8, 8, 1, 1)], {"spatial": "whole"}, "found 1×1, 3×3"),
        ([(12, 12, 3, 3)], {"out_ratio": Fraction(5, 12)}, "5 output channels .* does not divide 12"),
        ([(12, 12, 3, 3)], {"in_ratio": Fraction(2, 3)}, "8 input channels .* does not divide 12"),
        ([(12, 12, 3, 3)], {"budget": 0}, "greater than 0: found 0"),
        ([(12, 12, 3, 3)], {"cells": 0}, "at least one cell: found 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(kernels, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PartitionError, match=message):
        partition(kernels, **options)
