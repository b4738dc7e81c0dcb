"""Student's interval against printed tables, and paired differences by hand."""

import math

import pytest

from kw_lightning.sweep.statistics import paired_difference, summarize, t_quantile

# two-sided 95 and 99 %: Abramowitz and Stegun, table 26.10
PRINTED = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 9: (2.262, 3.250)}
PRINTED |= {10: (2.228, 3.169), 30: (2.042, 2.750), 60: (2.000, 2.660), 120: (1.980, 2.617)}


@pytest.mark.parametrize("freedom", PRINTED)
def test_quantiles_are_those_of_the_printed_tables(freedom: int) -> None:
    found = t_quantile(0.95, freedom), t_quantile(0.99, freedom)
    assert found == pytest.approx(PRINTED[freedom], abs=5.1e-4)


def test_quantiles_are_exact_where_there_is_a_closed_form() -> None:
    assert t_quantile(0.5, 1) == pytest.approx(1, abs=1e-12)  # Cauchy: tan(π/4)
    assert t_quantile(0.9, 2) == pytest.approx(0.9 * math.sqrt(2 / (1 - 0.9**2)), abs=1e-12)
    with pytest.raises(ValueError, match="confidence"):
        t_quantile(1.0, 3)


def test_the_difference_is_paired_over_the_seeds_that_both_have() -> None:
    first = {0: 0.90, 1: 0.92, 2: 0.94, 9: 0.1}
    other = {0: 0.91, 1: 0.94, 2: 0.97, 7: 0.9}
    found = paired_difference(first, other)
    assert found is not None
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert (found.mean, found.low, found.high, found.pairs) == pytest.approx((0.02, 0.02 - half, 0.02 + half, 3))


def test_one_seed_has_no_interval_and_none_nothing() -> None:
    one = paired_difference({3: 0.5}, {3: 0.75})
    assert one is not None
    assert (one.mean, one.low, one.high) == (0.25, None, None)
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    assert summarize([]) is None
    assert summarize([0.5]).deviation is None  # type: ignore[union-attr]
