"""Which layers share a warehouse, and with what cells and attention, so that the attention stays in proportion.

A layer's attention has about h · m · (n + 1) parameters: h is its hidden width, max(in_channels · reduction, 16), m its
mixtures and n the cells of its warehouse. Both m and n grow as the common divisors of the layers' channels shrink, so
layers of unlike or narrow shape can have many times more attention than cells. The search below goes from the widest
sharing to the narrowest, and takes the first that keeps the attention under `AIM` times the cells, or else the first
that keeps it under them:

1. all layers, cells as large as the common divisors allow;
2. layers that widen apart from those that narrow;
3. layers of one width or of one shape together, or runs of neighbours, whichever gives fewer warehouses;
4. with a narrower hidden layer, the low-rank attention, whole kernels as cells;
5. these for runs, at last for every layer alone.

A warehouse of fewer than `LEAST_CELLS` cells leaves nothing to choose from: its cells are cut smaller. What no way
serves stays static. All numbers are those of budget 1, so that networks of several budgets have the same warehouses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from kw_lightning.nn.attention import MINIMUM_WIDTH, attention_width
from kw_lightning.nn.partition import PartitionError, common_cell_shape, mixture_count
from kw_lightning.planning.geometry import attention_parameters
from kw_lightning.planning.selection import Choice
from kw_lightning.recipe.types import Attention, Cell

AIM = Fraction(1, 2)
"""Attention relative to cells that is aimed at; the published ResNets stay under it."""
LEAST_CELLS = 4
"""Fewest cells of a warehouse."""
NARROWER = (Fraction(1, 32), Fraction(1, 128))
LOW_RANK = Fraction(1, 16)


@dataclass(frozen=True)
class Size:
    """What a warehouse of budget 1 would have.

    Attributes:
        cells: their number.
        cell_parameters: of all cells.
        attention_parameters: of all layers.
    """

    cells: int
    cell_parameters: int
    attention_parameters: int

    def fits(self, limit: Fraction) -> bool:
        """Return whether the attention's parameters are within a multiple of the cells'."""
        return self.attention_parameters * limit.denominator <= self.cell_parameters * limit.numerator


@dataclass(frozen=True)
class Share:
    """Layers that go together in a warehouse.

    Attributes:
        choices: the layers, in module order.
        cell, attention: how the warehouse is made.
        suffix: what tells it from its neighbours, for its name.
    """

    choices: tuple[Choice, ...]
    cell: Cell
    attention: Attention
    suffix: str = ""


class _Division(NamedTuple):
    """A property that layers are told apart by, and how their group's suffix becomes that of a part."""

    key: Callable[[Choice], Hashable]
    suffix: Callable[[str, Choice], str]


def size_of(choices: Sequence[Choice], cell: Cell, attention: Attention) -> Size | None:
    """Return the size of a warehouse of budget 1 with these layers; None if they cannot share these cells."""
    shapes = [choice.kernel_shape for choice in choices]
    try:
        cell_shape = common_cell_shape(shapes, cell.out, cell.in_, cell.spatial)
    except PartitionError:
        return None
    mixtures = [mixture_count(shape, cell_shape) for shape in shapes]
    cells = sum(mixtures)
    sizes = (
        attention_parameters(attention, choice, count, cells, Fraction(1))
        for choice, count in zip(choices, mixtures, strict=True)
    )
    return Size(cells, cells * math.prod(cell_shape), sum(sizes))


def share(choices: Sequence[Choice], cell: Cell, attention: Attention) -> tuple[list[Share], list[Choice]]:
    """Group layers into warehouses.

    Args:
        choices: layers that may go together, in module order.
        cell, attention: as the recipe has them; what differs from the defaults there is kept.

    Returns:
        The warehouses, and the layers that no warehouse can serve with less attention than cells.
    """
    found: list[Share] = []
    left: list[Choice] = []
    for part in _parts(Share(tuple(choices), cell, attention)) if choices else ():
        (found if isinstance(part, Share) else left).append(part)  # type: ignore[arg-type]
    return found, left


def least_attention(choice: Choice, cell: Cell, attention: Attention) -> int | None:
    """Return the parameters of the smallest attention of a layer in a warehouse of its own; None if no cell fits it."""
    sizes = [size_of([choice], *way) for way in _ways([choice], cell, attention)]
    return min((size.attention_parameters for size in sizes if size is not None), default=None)


def _parts(group: Share) -> Iterator[Share | Choice]:
    """Yield the warehouses of a group, and single layers for which there is none."""
    plain = _suited(group, AIM)
    if plain is not None:
        yield plain
        return
    for division in (_BY_DIMENSIONS, _BY_DIRECTION):
        parts = _apart(group, division)
        if len(parts) > 1:
            for part in parts:
                yield from _parts(part)
            return
    yield from min(_of_several_widths(group), key=lambda parts: _cost(parts, group.attention))


def _of_several_widths(group: Share) -> Iterator[Sequence[Share | Choice]]:
    """Yield the ways to divide layers of one direction: by width, each width by shape or in runs; or in runs."""
    widths = _apart(group, _BY_WIDTH)
    together: list[Share | Choice] = []
    for width in widths:
        shapes = [width] if _suited(width, AIM) is not None else _apart(width, _BY_SHAPE)
        ways: list[Sequence[Share | Choice]] = [[found for part in shapes for found in _alike(part)]]
        if len(shapes) > 1:
            ways += _in_runs(width)
        together += min(ways, key=lambda parts: _cost(parts, group.attention))
    yield together
    if len(widths) > 1:
        yield from _in_runs(group)


def _in_runs(group: Share) -> Iterator[list[Share | Choice]]:
    for cell, attention in _ways(group.choices, group.cell, group.attention):
        if cell == group.cell and len(group.choices) > 1:
            yield list(_neighbours(group, replace(group, attention=attention)))


def _apart(group: Share, division: _Division) -> list[Share]:
    parts: dict[Hashable, list[Choice]] = {}
    for choice in group.choices:
        parts.setdefault(division.key(choice), []).append(choice)
    if len(parts) == 1:
        return [group]
    return [
        replace(group, choices=tuple(alike), suffix=division.suffix(group.suffix, alike[0])) for alike in parts.values()
    ]


def _cost(parts: Iterable[Share | Choice], attention: Attention) -> tuple[int, int]:
    """Return (numbers in kernels left static, warehouses): one with an attention of its own counts twice."""
    parts = list(parts)
    static = sum(math.prod(part.kernel_shape) for part in parts if isinstance(part, Choice))
    return static, sum(1 if part.attention == attention else 2 for part in parts if isinstance(part, Share))


def _neighbours(plain: Share, changed: Share) -> Iterator[Share | Choice]:
    """Yield runs of layers that follow each other, each as long as the changed attention allows.

    A run that does without the change stays plain, and a layer without neighbours is tried in every way.
    """
    runs: list[list[Choice]] = []
    for choice in plain.choices:
        longer = [*runs[-1], choice] if runs else []
        if longer and _suited(replace(changed, choices=tuple(longer)), AIM) is not None:
            runs[-1] = longer
        else:
            runs.append([choice])
    for number, run in enumerate(runs, start=1):
        suffix = plain.suffix if number == 1 else f"{plain.suffix}-{number}"
        alike = replace(plain, choices=tuple(run), suffix=suffix)
        if len(run) > 1 and _suited(alike, AIM) is None:
            alike = replace(alike, cell=changed.cell, attention=changed.attention)
        yield from _alike(alike)


def _alike(group: Share) -> tuple[Share | Choice, ...]:
    """Return the warehouses of layers that are not to be told apart any more."""
    parts = _unnamed(replace(group, suffix=""))
    return tuple(
        replace(part, suffix=group.suffix + part.suffix) if isinstance(part, Share) else part for part in parts
    )


@lru_cache(maxsize=1024)  # the ways to divide a group come back to the same layers
def _unnamed(group: Share) -> tuple[Share | Choice, ...]:
    """Return what `_alike` does, for a group without a suffix."""
    plain = _suited(group, AIM)
    if plain is not None:
        return (plain,)
    changed = [
        replace(group, cell=cell, attention=attention)
        for cell, attention in _ways(group.choices, group.cell, group.attention)
    ]
    for limit in (AIM, Fraction(1)):
        length = _run_length(group, limit)
        if length > 1:
            return tuple(_runs(group, length, limit))
        for way in changed:
            suited = _suited(way, limit)
            if suited is not None:
                return (suited,)
        if len(group.choices) > 1:
            longest = max(changed, key=lambda way: _run_length(way, limit))
            if length := _run_length(longest, limit):
                return tuple(_runs(longest, length, limit))
    return group.choices


def _suited(group: Share, limit: Fraction) -> Share | None:
    """Return a group with the largest cells that give enough of them within the limit."""
    for out, in_ in _CUTS:
        cell = replace(group.cell, out=group.cell.out * out, in_=group.cell.in_ * in_)
        size = size_of(group.choices, cell, group.attention)
        if size is not None and size.cells >= LEAST_CELLS:  # smaller cells only make the attention larger
            return replace(group, cell=cell) if size.fits(limit) else None
    return None


def _ways(choices: Sequence[Choice], cell: Cell, attention: Attention) -> Iterator[tuple[Cell, Attention]]:
    """Yield the settings that may serve layers of one shape, the nearest to the recipe's first."""
    cells = [cell]
    if cell.spatial == "split" and math.prod(choices[0].kernel_shape[2:]) > 1:
        cells.append(replace(cell, spatial="whole"))
    attentions = [attention]
    if attention.reduction == Attention.reduction:
        wide = attention_width(choices[0].layer.in_channels, attention.reduction) > MINIMUM_WIDTH
        attentions += [replace(attention, reduction=reduction) for reduction in NARROWER if wide]
    if attention.basis is None:
        attentions += [replace(attention, basis=LOW_RANK) for attention in attentions]
    for chosen in cells:
        yield from ((chosen, attention) for attention in attentions)


def _run_length(group: Share, limit: Fraction) -> int:
    """Return how many layers of one shape may share a warehouse within the limit; 0 if not even one may."""
    low, high = 0, len(group.choices)
    while low < high:  # the attention grows with the cells, so that longer runs never fit better
        middle = (low + high + 1) // 2
        if _suited(replace(group, choices=group.choices[:middle]), limit) is not None:
            low = middle
        else:
            high = middle - 1
    return low


def _runs(group: Share, length: int, limit: Fraction) -> Iterator[Share | Choice]:
    """Yield runs of nearly equal length, none longer than `length`."""
    count = math.ceil(len(group.choices) / length)
    ends = [len(group.choices) * number // count for number in range(count + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(ends), start=1):
        suffix = group.suffix if number == 1 else f"{group.suffix}-{number}"
        run = _suited(replace(group, choices=group.choices[start:end], suffix=suffix), limit)
        if run is not None:
            yield run
        else:
            yield from group.choices[start:end]


_CUTS = tuple((Fraction(1, out), Fraction(1, in_)) for out, in_ in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)))
"""Shares of the output and input channels that cells have."""


def _widens(choice: Choice) -> bool:
    return choice.kernel_shape[0] > choice.kernel_shape[1]


def _width(choice: Choice) -> int:
    return min(choice.kernel_shape[:2]) if choice.layer.groups == 1 else choice.layer.in_channels


def _shape_name(suffix: str, choice: Choice) -> str:
    sides = [side for index, side in enumerate(choice.kernel_shape) if index < 2 or side > 1]
    return f"{suffix.rstrip('0123456789').rstrip('-')}-{'x'.join(map(str, sides))}"


_BY_DIMENSIONS = _Division(
    lambda choice: len(choice.kernel_shape),
    lambda suffix, choice: f"{suffix}-{len(choice.kernel_shape) - 2}d",
)
_BY_DIRECTION = _Division(
    lambda choice: choice.layer.groups > 1 or _widens(choice),
    lambda suffix, choice: f"{suffix}-{'widen' if _widens(choice) else 'narrow'}",
)
_BY_WIDTH = _Division(_width, lambda suffix, choice: f"{suffix}{'' if suffix else '-'}{_width(choice)}")
_BY_SHAPE = _Division(lambda choice: choice.kernel_shape, _shape_name)


__all__ = ["AIM", "LEAST_CELLS", "Share", "Size", "least_attention", "share", "size_of"]
