"""Attention beside the cells that it weighs: what a plan warns of, what it refuses, and which layer is to blame.

An attention has about mixtures × cells columns. Layers whose channels have a small common divisor are cut into very
many small cells, and one odd layer in a glob is enough for that: a network of 0.1 million parameters becomes one of 500
million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from kw_lightning.errors import Problem, sentence, times
from kw_lightning.planning.selection import Choice
from kw_lightning.planning.sharing import size_of
from kw_lightning.planning.types import WarehousePlan
from kw_lightning.recipe.types import Document, Warehouse

REFUSED = 64.0
"""Attention relative to cells that is refused unless the recipe says otherwise: published recipes go up to 41."""
HARMLESS = 10_000_000
"""Parameters of an attention that is not refused unless the recipe says so, however few its cells are."""


def refusals(warehouses: Sequence[WarehousePlan], document: Document) -> Iterator[Problem]:
    """Yield a problem for every warehouse whose attention is past `attention.at_most`."""
    for warehouse in warehouses:
        most = warehouse.attention.at_most
        if most is None and warehouse.attention_parameters <= HARMLESS:
            continue
        bound = REFUSED if most is None else most
        if warehouse.attention_parameters > bound * warehouse.cell_parameters:
            text = sentence(_finding(warehouse), f"× {bound:g}", f"{_cure(warehouse)}; attention.at_most allows more")
            yield document.problem(warehouse.spec.path, text)


def warning(warehouses: Sequence[WarehousePlan]) -> str | None:
    """Return one sentence on the warehouses whose attention exceeds their cells, the worst in full; None without any.

    Those whose recipe says `attention.at_most` are meant to be so.
    """
    outgrown = [
        warehouse
        for warehouse in warehouses
        if warehouse.attention.at_most is None and warehouse.attention_parameters > warehouse.cell_parameters
    ]
    if not outgrown:
        return None
    worst = max(outgrown, key=lambda warehouse: warehouse.attention_parameters - warehouse.cell_parameters)
    others = [f'"{warehouse.name}"' for warehouse in outgrown if warehouse is not worst]
    more = f" (so it is in {', '.join(others[:6])}{' and others' if len(others) > 6 else ''})" if others else ""
    return (
        f'warehouse "{worst.name}": {_finding(worst)}{more}; {_cure(worst)}; attention.at_most says that it is meant so'
    )


def blamed(spec: Warehouse, choices: Sequence[Choice]) -> Choice | None:
    """Return a layer of the kernel shape that does most to make the attention large beside the cells.

    It is the shape without which attention relative to cells is least, of those that hold no more than half of the
    cells; None where that ratio would not at least be halved.
    """
    whole = size_of(choices, spec.cell, spec.attention)
    examples = {choice.kernel_shape: choice for choice in reversed(choices)}
    if whole is None or len(examples) < 2:
        return None
    best, example = Fraction(whole.attention_parameters, 2 * whole.cell_parameters), None
    for shape, choice in examples.items():
        size = size_of([other for other in choices if other.kernel_shape != shape], spec.cell, spec.attention)
        if size is None or 2 * size.cell_parameters < whole.cell_parameters:
            continue
        found = Fraction(size.attention_parameters, size.cell_parameters)
        if found < best:
            best, example = found, choice
    return example


def without_it(spec: Warehouse, choices: Sequence[Choice]) -> str:
    """Return how the cells of a warehouse become larger: which layer is left out, or apart, and by which key."""
    if min(spec.cell.out, spec.cell.in_) < 1:
        return (
            "cell.out and cell.in cut them smaller than the layers need, or leave layers out by exclude or min_channels"
        )
    odd = blamed(spec, choices)
    if odd is not None:
        shape = times(odd.kernel_shape)
        return f'"{odd.name}" [{shape}] makes the cells small: leave it out by exclude or min_channels'
    if len({choice.kernel_shape for choice in choices}) > 1:
        return "give layers of like shape warehouses of their own, or leave narrow ones out by exclude or min_channels"
    shape = times(choices[0].kernel_shape)
    return (
        f'layers such as "{choices[0].name}" [{shape}] are small beside an attention: leave them out by exclude '
        "or min_channels, or give them cell.spatial: whole"
    )


def _finding(warehouse: WarehousePlan) -> str:
    ratio = warehouse.attention_parameters / warehouse.cell_parameters
    layers = f"{len(warehouse.layers)} layer{'' if len(warehouse.layers) == 1 else 's'}"
    cell = times(warehouse.partition.cell_shape)
    return (
        f"an attention of {warehouse.attention_parameters:,} parameters in {layers} beside "
        f"{warehouse.cell_parameters:,} in {warehouse.partition.cells:,} cells of {cell} (× {_round(ratio)})"
    )


def _round(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _cure(warehouse: WarehousePlan) -> str:
    narrower = ", or narrow stages.sharing" if warehouse.spec.path == "stages" and len(warehouse.layers) > 1 else ""
    return without_it(warehouse.spec, [layer.choice for layer in warehouse.layers]) + narrower


__all__ = ["HARMLESS", "REFUSED", "blamed", "refusals", "warning", "without_it"]
