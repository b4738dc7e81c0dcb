"""How many cells a budget buys: the solver behind `budget: {parameters: 7.5M}` and `model.budget`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from kw_lightning.errors import Problem
from kw_lightning.limits import MAX_PARAMETERS
from kw_lightning.nn.partition import WarehousePartition
from kw_lightning.planning.geometry import Geometry
from kw_lightning.recipe.types import Budget, Document

MAX_RATIO = 64
"""The largest budget that is tried for a number of parameters."""


def solve(
    geometries: Sequence[Geometry],
    *,
    static_parameters: int,
    fixed_parameters: int,
    overall: Budget | None,
    document: Document,
) -> tuple[dict[str, WarehousePartition], list[Problem]]:
    """Return each warehouse's partition with as many cells as its budget buys.

    `{parameters: N}` buys the most cells whose parameters, attention included, are at most N. A budget for the whole
    recipe scales all warehouses whose budget is a ratio by one common factor, then gives single cells to whom they
    still fit; warehouses with a number of cells or of parameters keep it.

    Args:
        geometries: the warehouses, in the recipe's order.
        static_parameters: of the static network.
        fixed_parameters: of the network without the kernels that become dynamic.
        overall: `model.budget`, None when each warehouse has its own.
        document: the recipe, for the places of problems.
    """
    problems: list[Problem] = []
    partitions: dict[str, WarehousePartition] = {}
    for geometry in geometries:
        budget, name = geometry.spec.budget, geometry.spec.name
        if budget.parameters is not None:
            try:
                partitions[name] = geometry.partition(cells=_most_cells(geometry, budget.parameters))
            except _ImpossibleError as impossible:
                problems.append(document.problem(f"{geometry.spec.path}.budget", str(impossible)))
        elif budget.cells is not None:
            partitions[name] = geometry.partition(cells=budget.cells)
        else:
            partitions[name] = geometry.partition(budget=budget.ratio if budget.ratio is not None else Fraction(1))
    if overall is not None and not problems:
        elastic = [geometry for geometry in geometries if geometry.spec.budget.ratio is not None]
        rigid = sum(g.size_of(partitions[g.spec.name]) for g in geometries if g not in elastic)
        target = overall.parameters
        if target is None:
            target = int((overall.relative or Fraction(1)) * static_parameters)
        try:
            cells = _scale(elastic, target - fixed_parameters - rigid, fixed_parameters + rigid)
        except _ImpossibleError as impossible:
            problems.append(document.problem("model.budget", str(impossible)))
        else:
            partitions |= {g.spec.name: g.partition(cells=cells[g.spec.name]) for g in elastic}
    return partitions, problems


class _ImpossibleError(Exception):
    pass


def _most_cells(geometry: Geometry, parameters: int) -> int:
    least, most = geometry.size(1), geometry.size(MAX_RATIO * geometry.mixtures)
    _check_range(parameters, least, most, f'warehouse "{geometry.spec.name}"')
    return _largest(lambda cells: geometry.size(cells) <= parameters, 1, MAX_RATIO * geometry.mixtures)


def _scale(geometries: Sequence[Geometry], parameters: int, fixed: int) -> dict[str, int]:
    """Return the cells of each warehouse that together have at most so many parameters, in the recipe's proportions."""
    if not geometries:
        raise _ImpossibleError("no warehouse has a budget that could be changed: all ask for cells or parameters")
    largest = max(geometry.spec.budget.ratio or Fraction(1) for geometry in geometries)
    steps = 1 << 20

    def cells_at(step: int) -> dict[str, int]:
        factor = Fraction(step * MAX_RATIO, steps) / largest
        return {g.spec.name: g.cells_at(factor * (g.spec.budget.ratio or 1)) for g in geometries}

    def size(cells: Mapping[str, int]) -> int:
        return sum(g.size(cells[g.spec.name]) for g in geometries)

    _check_range(parameters + fixed, size(cells_at(0)) + fixed, size(cells_at(steps)) + fixed, "the network")
    cells = cells_at(_largest(lambda step: size(cells_at(step)) <= parameters, 0, steps))
    for geometry in sorted(geometries, key=lambda g: g.size(2) - g.size(1), reverse=True):
        name = geometry.spec.name
        if size(cells | {name: cells[name] + 1}) <= parameters:
            cells[name] += 1
    return cells


def _check_range(asked: int, least: int, most: int, what: str) -> None:
    most = min(most, MAX_PARAMETERS)
    if not least <= asked <= most:
        raise _ImpossibleError(
            f"{what} cannot have {asked:,} parameters, attention included: "
            f"reachable are {least:,} (one cell a warehouse) to {most:,} (budget {MAX_RATIO})"
        )


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number between `low` (which fits) and `high` that fits, for a test that turns once."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
