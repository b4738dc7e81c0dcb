"""The plan as people read it: rich tables on a terminal, aligned plain text in a pipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kw_lightning.errors import listed, times
from kw_lightning.nn.adapter import trainable_line
from kw_lightning.planning.types import Count, Plan, WarehousePlan, budget_text
from kw_lightning.preprocessing import preprocessing
from kw_lightning.rand_augment import difference

NAMES_SHOWN = 12


@dataclass(frozen=True)
class PlanTable:
    """A plan to print with rich.

    Attributes:
        plan: the plan.
        layers: show every dynamic layer too, and which layers stay static and why.
        errors: of a warm start, each warehouse's relative error; see `kw_lightning.builder.Conversion`.
    """

    plan: Plan
    layers: bool = True
    errors: Mapping[str, float] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables; without lines and colours where the output is no terminal."""
        style = box.SIMPLE_HEAD if console.is_terminal else None
        plan = self.plan
        shape = "" if plan.input_shape is None else f", input {times(plan.input_shape)}"
        yield Text(f"{plan.recipe.name}{shape}", style="bold")
        if plan.warehouses:
            yield from _fitted(_warehouse_columns(plan, self.errors), style, console, options)
        if self.layers and plan.warehouses:
            yield Text("")
            yield from _fitted(_layer_columns(plan), style, console, options)
        if self.layers:
            yield from (Text(line) for line in _static_lines(plan))
        yield Text("")
        yield from (Text(line) for line in total_lines(plan))


def total_lines(plan: Plan) -> list[str]:
    """Return the totals beside the static network's, one line each."""
    lines = []
    if len(plan.warehouses) > 1:
        cells, attention = (
            sum(getattr(warehouse, f"{part}_parameters") for warehouse in plan.warehouses)
            for part in ("cell", "attention")
        )
        lines.append(
            f"warehouses        cells {cells:,} ({_short(cells)}), attention {attention:,} ({_short(attention)})"
        )
    lines.append(f"parameters        {_beside(plan.parameters)}")
    if plan.trainable is not None:
        lines.append(f"                  {trainable_line(plan.trainable, plan.parameters.kw)}")
    if plan.macs is not None:
        lines.append(f"multiply-adds     {_beside(plan.macs)}, one sample; attention and mixing included")
    else:
        lines.append(f"multiply-adds     unknown: {plan.macs_note}")
    steps = preprocessing(plan.recipe)
    if steps is not None:
        lines.append(f"preprocessing     {steps.describe()}")
        if steps.source:
            lines.append(f"                  ({steps.source})")
    augmented = difference(plan.recipe)
    if augmented is not None:
        lines.append(f"RandAugment       {augmented}")
    if plan.asked is not None:
        lines.append(f"budget            asked {budget_text(plan.asked)}, reached {plan.parameters.kw:,} parameters")
    return lines


@dataclass(frozen=True)
class _Column:
    title: str
    cells: tuple[str, ...]
    right: bool = True


def _warehouse_columns(plan: Plan, errors: Mapping[str, float]) -> list[_Column]:
    geometry = ("warehouse", "layers", "D_out, D_in", "cell", "mixtures", "cells", "budget", "reached")
    titles = (*geometry, "cell parameters", "attention", "multiply-adds")
    rows = [
        (
            warehouse.name,
            str(len(warehouse.layers)),
            ", ".join(map(str, warehouse.divisors)),
            times(warehouse.partition.cell_shape),
            str(warehouse.partition.mixtures),
            str(warehouse.partition.cells),
            "recipe" if plan.asked is not None and warehouse.asked.ratio else budget_text(warehouse.asked),
            f"{float(warehouse.budget):.3g}",
            f"{warehouse.cell_parameters:,}",
            f"{warehouse.attention_parameters:,}",
            _macs(warehouse),
        )
        for warehouse in plan.warehouses
    ]
    columns = _columns(titles, rows, left=1)
    if errors:
        columns.append(_Column("warm start's error", tuple(f"{errors[found.name]:.3f}" for found in plan.warehouses)))
    return columns


def _layer_columns(plan: Plan) -> list[_Column]:
    titles = ("layer", "warehouse", "type", "kernel", "mixtures", "first cell", "attention")
    rows = [
        (
            layer.name or "(the network itself)",
            warehouse.name if index == 0 else "",
            layer.layer.type,
            times(layer.partition.kernel_shape),
            str(layer.partition.mixtures),
            str(layer.partition.first_cell),
            f"{layer.attention_parameters:,}",
        )
        for warehouse in plan.warehouses
        for index, layer in enumerate(warehouse.layers)
    ]
    return _columns(titles, rows, left=3)


def _columns(titles: Sequence[str], rows: Sequence[tuple[str, ...]], left: int) -> list[_Column]:
    """Return a table by its columns, of which the first `left` stand at the left."""
    cells = zip(*rows, strict=True)
    return [
        _Column(title, column, right=index >= left)
        for index, (title, column) in enumerate(zip(titles, cells, strict=True))
    ]


def _fitted(
    columns: Sequence[_Column], style: box.Box | None, console: Console, options: ConsoleOptions
) -> Iterator[Table]:
    """Yield as many tables, one below the other, as it takes to show all columns; each begins with the first."""
    shown = [columns[0]]
    for column in columns[1:]:
        wider = _table([*shown, column], style)
        if (
            len(shown) > 1
            and Measurement.get(console, options.update(max_width=10_000), wider).maximum > options.max_width
        ):
            yield _table(shown, style)
            shown = [columns[0]]
        shown.append(column)
    yield _table(shown, style)


def _table(columns: Sequence[_Column], style: box.Box | None) -> Table:
    table = Table(box=style, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _static_lines(plan: Plan) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for static in plan.static_layers:
        reasons.setdefault(static.reason, []).append(static.layer.name or "(the network itself)")
    lines = [""] if reasons else []
    for reason, names in reasons.items():
        lines.append(f"static: {listed(_alike(names), NAMES_SHOWN)} ({reason})")
    return lines


def _alike(names: Sequence[str]) -> list[str]:
    """Return names that differ in their first number only as one glob: `blocks.*.attn.proj (12)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    return [f"{glob} ({len(found)})" if len(found) > 1 else found[0] for glob, found in groups.items()]


def _macs(warehouse: WarehousePlan) -> str:
    counts = [layer.macs for layer in warehouse.layers if layer.macs is not None]
    return _short(sum(count.kw for count in counts)) if counts else ""


def _beside(count: Count) -> str:
    return f"{count.kw:,} ({_short(count.kw)}), static {count.static:,} ({_short(count.static)}), × {count.ratio:.3g}"


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
