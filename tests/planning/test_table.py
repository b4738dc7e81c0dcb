"""The plan as people read it, on terminals of several widths."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kw_lightning.planning import plan
from kw_lightning.planning.table import PlanTable, total_lines
from kw_lightning.recipe import load_recipe


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_every_column_is_shown_whole_at_any_width(width: int) -> None:
    planned = plan(load_recipe("resnet18-kw-1x"))
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(PlanTable(planned))
    text = stream.getvalue()
    lines = [line.strip() for line in text.partition("static:")[0].splitlines()]
    assert max(map(len, lines)) <= width
    first, titles = planned.warehouses[0], ("D_out, D_in", "reached", "cell parameters", "attention", "multiply-adds")
    for value in (f"{first.cell_parameters:,}", f"{first.attention_parameters:,}", str(first.partition.cells)):
        shown = re.compile(rf"{first.name} .*(?<![\d,]){value}(?![\d,])")
        assert any(shown.match(line) for line in lines), value
    for layer in first.layers:
        assert any(re.match(rf"{re.escape(layer.name)} .*{layer.partition.first_cell}( |$)", line) for line in lines)
    assert all(any(title in line for line in lines) for title in (*titles, "first cell", "kernel"))
    assert "…" not in "".join(lines)


def test_a_size_that_is_the_data_sets_own_has_no_source() -> None:
    layers = ["Flatten", {"Dense": {"units": 10}}]
    planned = plan(load_recipe({"kw": 1, "model": {"input": [1, 8, 8], "layers": layers}, "data": {"name": "digits"}}))
    assert total_lines(planned)[-1] == "preprocessing     bilinear, both sides 8"
