"""The kept table of the sweep: that it covers the networks that are installed, and what it promises of them."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import zoo


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(zoo.table().values())


def test_networks_keep_their_size_at_budget_1(rows: list[dict[str, Any]]) -> None:
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    assert len(ratios) >= 210
    assert statistics.median(ratios) <= 1.25
    assert max(ratios) <= 2
    assert max(row["worst"] for row in rows if "worst" in row) <= 1  # no warehouse's attention exceeds its cells


def test_every_network_trains_and_reloads_or_says_why_not(rows: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in rows if "traceback" in row] == []
    for row in rows:
        if "refused" in row:
            assert row["refused"].startswith(("stages: no stages to be found", "not done in")), row
        elif "left_out" not in row:
            assert row["step"] == "ok", row
            assert row["reload"] == "ok", row
            assert row["warm_start_error"] == 0, row
    trained = [row for row in rows if row.get("step") == "ok"]
    assert len(trained) >= 150
    assert len([row for row in rows if "refused" in row]) <= 3


def test_table_covers_what_is_installed(rows: list[dict[str, Any]]) -> None:
    import torchvision

    kept = json.loads(zoo.TABLE.read_text())["versions"]
    names = {row["name"] for row in rows}
    if torchvision.__version__.partition("+")[0] == kept["torchvision"].partition("+")[0]:
        assert set(zoo.torchvision_names()) <= names
    timm = pytest.importorskip("timm")
    if timm.__version__ == kept["timm"]:
        assert set(zoo.timm_modules()) == {row["module"] for row in rows if "module" in row}
    modules = {
        timm.models.model_entrypoint(row["name"].partition("/")[2]).__module__: row for row in rows if "module" in row
    }
    assert all(module.rpartition(".")[2] == row["module"] for module, row in modules.items())
