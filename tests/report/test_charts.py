"""Charts of large and of odd things: bounded, and true where they are read."""

from __future__ import annotations

import base64
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kw_lightning.callbacks.attention_metric import AttentionSummary
from kw_lightning.callbacks.heat_map import coarser
from kw_lightning.nn.partition import partition
from kw_lightning.report.attention import LayerAttention, WarehouseAttention
from kw_lightning.report.charts import Series, confusion_chart, heat_map_chart, line_chart
from kw_lightning.report.page import Page
from kw_lightning.report.parts import attention
from kw_lightning.report.record import RunRecord


def warehouse(name: str, rows: int, columns: int) -> WarehouseAttention:
    (share,) = partition([(rows, 4, 1, 1)], cells=columns, out_ratio=Fraction(1, rows)).layers
    mean = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns
    mean[range(min(rows, columns)), range(min(rows, columns))] += 1
    summary = AttentionSummary(mean, 0.4, 1.0, 10.0, 3, 0.9)
    return WarehouseAttention(name, summary, (LayerAttention("layer", share, 0.4, 10, None),))


def test_the_largest_networks_make_a_page_of_less_than_five_megabytes(tmp_path: Path) -> None:
    found = [warehouse(f"stage{k}", 900, 1800) for k in range(3)]
    part = attention(found, RunRecord(tmp_path), "val")
    html = Page("large", "", (), [part], "").html()
    assert len(html.encode()) < 5e6
    assert [chart.title for chart in part.charts] == [f"stage{k}: mean attention" for k in range(3)]


def test_a_block_shows_its_largest_value_so_that_the_diagonal_stays() -> None:
    values = np.eye(100) - 2 * np.eye(100, k=50)
    shown, side = coarser(values, 100)
    assert (shown.shape, side) == ((10, 10), 10)
    assert set(np.diag(shown)) == {1.0}
    assert set(np.diag(shown, k=5)) == {-2.0}
    assert coarser(values, 10_000)[1] == 1
    ragged, side = coarser(np.ones((7, 5)), 9)
    assert (ragged.shape, side) == ((4, 3), 2)


def test_values_are_read_as_they_are_drawn() -> None:
    found = warehouse("a", 30, 40)
    grid = heat_map_chart(found).reading["grid"]
    coded = np.frombuffer(base64.b64decode(grid["values"]), "<i2").reshape(grid["rows"], grid["columns"])
    np.testing.assert_allclose(coded * grid["scale"], found.summary.mean, atol=1e-4)
    left, top, right, bottom = grid["box"]
    assert 0 < left < right < 1
    assert 0 < top < bottom < 1
    counts = np.array([[3, 1], [40_000, 0]])
    grid = confusion_chart(counts, ["a", "b"]).reading["grid"]
    coded = np.frombuffer(base64.b64decode(grid["values"]), "<i2").reshape(2, 2)
    np.testing.assert_allclose(coded * grid["scale"], counts, atol=1)


def test_lines_leave_out_what_is_no_number_and_stay_short() -> None:
    y = [float("nan"), 1.0, float("inf"), *np.linspace(1, 0, 5000).tolist()]
    chart = line_chart("Loss", [Series("$a_{<b>", list(range(len(y))), y), Series("_none", [], [])])
    lines = chart.reading["series"]
    assert [len(line) for line in lines] == [400, 0]
    assert lines[0][0][2] == "$a_{<b>, epoch 1: 1"
    assert lines[0][-1][2].endswith("epoch 5002: 0")
    assert "$a_{&lt;b&gt;" in chart.svg
    assert all(0 <= x <= 1 and 0 <= top <= 1 for x, top, _ in lines[0])


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_epochs_are_whole_numbers(epochs: int) -> None:
    chart = line_chart("Loss", [Series("train", list(range(1, epochs + 1)), [1.0] * epochs)])
    under_it = str(chart.svg).partition(">epoch<")[0]
    marked = re.findall(r"<text[^>]*>([^<]*)</text>", under_it)
    assert marked
    assert all(number.isdecimal() for number in marked)


@pytest.mark.parametrize("count", [1, 25, 26])
def test_a_confusion_matrix_has_names_while_they_can_be_read(count: int) -> None:
    names = [f"\x00<i>{k}" for k in range(count)]
    chart = confusion_chart(np.eye(count, dtype=np.int64), names)
    assert ("&lt;i&gt;0" in chart.svg) == (count <= 25)
    assert "\x00" not in chart.svg
    assert f"{count:,} of {count:,} images" in chart.alternative
