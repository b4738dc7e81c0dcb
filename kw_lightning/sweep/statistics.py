"""Mean, deviation and paired differences over seeds, with Student's interval; exact, and without a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Figures of one row: their mean, their sample standard deviation (None of a single one), and their number."""

    mean: float
    deviation: float | None
    count: int

    def text(self, show: Callable[[float, str], str]) -> str:
        """Return `mean ± deviation`; `show` writes a figure, with the sign "+" where both signs are to be seen."""
        return show(self.mean, "") + ("" if self.deviation is None else f" ± {show(self.deviation, '')}")


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its interval; the bounds are None where there is a single pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def text(self, show: Callable[[float, str], str]) -> str:
        """Return `mean (low to high)`; `show` writes a figure, as for `Summary`."""
        if self.low is None or self.high is None:
            return show(self.mean, "+")
        return f"{show(self.mean, '+')} ({show(self.low, '+')} to {show(self.high, '+')})"


def points(value: float, sign: str) -> str:
    """Return a figure in percent, or a difference of two, with two decimals."""
    return f"{value:{sign}.2f}"


def summarize(values: Sequence[float]) -> Summary | None:
    """Return mean and deviation; None of nothing."""
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(
    first: Mapping[int, float], other: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Return how far `other` lies above `first` over the seeds that both have; None where they share none.

    The interval is mean ± t · s / √n with n - 1 degrees of freedom: what differs between seeds, as start and order of
    the images, falls out of each pair.

    Args:
        first: figures by seed.
        other: figures by seed.
        confidence: of the interval.
    """
    found = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())]
    if not found:
        return None
    mean = statistics.fmean(found)
    if len(found) == 1:
        return Difference(mean, None, None, 1)
    half = t_quantile(confidence, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(mean, mean - half, mean + half, len(found))


def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t that Student's variable stays between -t and t of with this probability.

    Args:
        confidence: over 0 and under 1.
        freedom: degrees of freedom, 1 or more.

    Raises:
        ValueError: outside of these.
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"found a confidence of {confidence} and {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2  # bisected over the angle, which is bounded where t is not
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """Return the probability of |T| < √freedom · tan(angle), a finite sum (Abramowitz and Stegun, 26.7.3, 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
