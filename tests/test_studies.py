"""The studies: what they compare is what they say, and nothing is chosen by test images."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fashion() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes/studies/fashion.py"))


@pytest.mark.parametrize(("network", "parameters"), [("separable", 13_354), ("inverted", 16_234), ("wide", 136_202)])
def test_networks_of_the_study_on_fashion_are_those_that_were_laid_down(
    network: str, parameters: int, fashion: dict[str, Any]
) -> None:
    for row in ("static", "KW 1×", "CondConv, as large as KW 4×"):
        planned = plan(load_recipe(fashion["recipe_of"](network, fashion["ROWS"][row], 2.0 if "Cond" in row else 1.0)))
        assert planned.parameters.static == parameters
        assert planned.warehouses or row == "static"


def test_a_row_that_is_like_another_has_its_size_or_cost(fashion: dict[str, Any]) -> None:
    rows, recipe_of, count = (fashion[name] for name in ("ROWS", "recipe_of", "count"))
    for row in ("static, as large as KW 1/2×", "static, as costly as KW 1/2×"):
        what, other = rows[row].like
        wanted = count(recipe_of("separable", rows[other]), what)
        found = count(recipe_of("separable", rows[row], fashion["scale_of"]("separable", row)), what)
        assert found == pytest.approx(wanted, rel=0.03)


def test_settings_are_chosen_on_validation_and_only_chosen_ones_see_the_test_images(
    fashion: dict[str, Any], tmp_path: Path
) -> None:
    run, rates, shares = fashion["Run"], fashion["RATES"], fashion["SHARES"]
    study = fashion["Study"](tmp_path / "fashion.json", fashion["Length"](), "", ["cpu"])

    def add(made: Any, **found: float) -> None:
        study.found[made] = {"parameters": 10, "macs": 20, **found}

    for share in shares:
        for made in fashion["annealing_runs"]("separable", share):
            add(made, validation=90 - abs(share - 0.4))
    assert fashion["choose_share"](study, "separable") == 0.4
    for row, best in (("static", 1e-2), ("KW 1×", 1e-3)):
        for rate in rates:
            share = 0.4 if row != "static" else 0.0
            add(run("separable", row, rate, share, 100, test=False), validation=80 + (rate == best))
    chosen = list(fashion["chosen_runs"](study, "separable", ["static", "KW 1×"], 0.4))
    assert [(made.rate, made.test) for made in chosen] == [(1e-2, False), (1e-3, False)]
    tested = fashion["tested_runs"](chosen, range(2))
    assert [(made.row, made.seed) for made in tested if made.test] == [
        *(("static", 0), ("KW 1×", 0), ("static", 1), ("KW 1×", 1))
    ]
    for made, accuracy in zip(tested, (80.0, 81.0, 82.0, 84.0), strict=True):
        add(made, validation=80.0, test=accuracy)
    study.write()
    again = fashion["Study"](tmp_path / "fashion.json", fashion["Length"](), "", ["cpu"])
    assert again.found == study.found
    assert len(json.loads((tmp_path / "fashion.json").read_text())) == len(study.found)
    row = next(
        line for line in fashion["table"](again, "separable", range(5)).splitlines() if line.startswith("| KW 1×")
    )
    assert row == "| KW 1× | 10 | 20 | 0.001 | 40% | 2 | 82.50 ± 2.12 | +1.50 (-4.85 to +7.85) |"
    assert "| +1.50 (-4.85 to +7.85) | reached |" in fashion["judged"](again, range(5))


def test_the_study_of_epilogues_times_four_forms_of_a_network() -> None:
    study = runpy.run_path(str(ROOT / "recipes/studies/epilogues.py"))
    ticks = itertools.count()
    with torch.inference_mode():
        times = study["Forms"]("digits-resnet").times(torch.randn(1, 1, 8, 8), 2, lambda: float(next(ticks)))
    assert times == {form: [1.0, 1.0] for form in ("static", "static folded", "without", "with")}
    assert list(study["row"](times)) == ["1000.0 ms"] * 3 + ["1.00 ×"] * 4


def test_the_study_of_many_cells_measures_both_ways_beside_the_static_network(tmp_path: Path) -> None:
    study = runpy.run_path(str(ROOT / "recipes/studies/cells.py"))
    sizes = {"training": (4, 8), "inference": (2, 8)}
    rows = list(study["measure"](8, [1, 4], sizes, 1))
    assert rows[1]["cells"] == 4 * rows[0]["cells"]
    for row in rows:
        assert all(row[mode].keys() == {"cell by cell", "along the rank"} for mode in sizes)
        assert all(ratio > 0 for mode in sizes for ratio in row[mode].values())
        assert row["kept"] < 3
    with pytest.raises(ValueError, match="a width of 8 or more: found 4"):
        next(study["measure"](4, [1], sizes, 1))


@pytest.mark.parametrize(("backward", "work"), [(False, "1.50 ×"), (True, "1.75 ×")])
def test_the_study_of_products_gives_a_layer_its_row(backward: bool, work: str) -> None:
    study = runpy.run_path(str(ROOT / "recipes/studies/engine_products.py"))
    with torch.inference_mode():
        row = study["compare"](("small", 16, 32, 1, 4, 1, (16, 16), 8, 1), 2, 1, backward=backward)
    name, batch, static, ours, counted, products = [column.strip() for column in row.strip("|").split("|")]
    assert (name, batch, counted) == ("small", "2", work)
    assert float(static.removesuffix(" ms")) >= 0 < float(ours.removesuffix(" ×"))
    assert products
