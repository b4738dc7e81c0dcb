"""Pages that compare runs: groups by recipe, curves over each other, differences of recipes and plans."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hostile_run import RECIPE, SCRIPT
from page_reader import read
from typer.testing import CliRunner, Result

from kw_lightning.cli import application
from kw_lightning.recipe import load_recipe, lock_text
from kw_lightning.report.charts import Series
from kw_lightning.report.comparison import compare, find_runs, mean_series
from kw_lightning.sweep.folder import Entry, Manifest


def kw(*arguments: object) -> Result:
    return CliRunner().invoke(application(), ["report", *map(str, arguments)])


def write_run(folder: Path, *overrides: str, accuracy: float = 0.5) -> Path:
    """Write a run folder as kw-fit leaves it, without a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "model").mkdir()
    text = lock_text(load_recipe({**RECIPE, "model": {**RECIPE["model"], "layers": layers()}}, overrides))
    for name in ("recipe.lock.yaml", "model/recipe.lock.yaml"):
        (folder / name).write_text(text, encoding="utf-8")
    lines = [f"{step},{step - 1},{accuracy + step / 100},{1 / step}" for step in (1, 2, 3)]
    (folder / "metrics.csv").write_text("\n".join(["step,epoch,val/accuracy,val/loss", *lines]))
    metrics = {"accuracy": accuracy, "loss": 0.25}
    (folder / "result.json").write_text(json.dumps({"val": {"last": {"accuracy": 0.1}, "best": metrics}}))
    return folder


def layers() -> list[object]:
    *convolutions, _ = RECIPE["model"]["layers"]
    return [*convolutions, {"Dense": {"units": 3}}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "grid"
    for budget, first in (("1/2", 0.3), ("1", 0.5)):
        for seed in (0, 1):
            overrides = [f"warehouses.shelf.budget={budget}", f"train.seed={seed}"]
            name = folder / f"budget={budget.replace('/', '_')}" / f"seed={seed}"
            write_run(name, *overrides, accuracy=first + seed / 10)
    write_run(folder / SCRIPT.replace("/", "") / "seed=10", "train.epochs=3", accuracy=0.9)
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_a_deviation(runs: Path) -> None:
    done = kw(runs)
    assert (done.exit_code, done.stdout.strip()) == (0, str(runs / "report.html"))
    page = read(runs / "report.html")
    row = re.search(r"budget=1_2 2 (\S+) (\S+) 35\.00 ± 7\.07 % 0\.2500 ± 0\.0000", page.text)
    assert row is not None
    assert re.search(r"budget=1 2 (\S+) (\S+) 55\.00 ± 7\.07 %", page.text)
    assert SCRIPT.replace("/", "") in page.text
    titles = [str(a["aria-label"]) for _, a in page.tags if a.get("class") == "chart"]
    assert [title.partition(".")[0] for title in titles] == ["val/accuracy", "val/loss"]
    assert "budget=1_2 goes from 36.00% to 38.00%" in titles[0]
    assert "± 7.07%" in (runs / "report.html").read_text(encoding="utf-8").replace("\\u00b1", "±")


def test_what_recipes_and_plans_have_otherwise_stands_beside_each_other(runs: Path, tmp_path: Path) -> None:
    first, other = runs / "budget=1_2/seed=0", runs / "budget=1/seed=1"
    done = kw(first, other, "--output", tmp_path / "two.html")
    assert done.exit_code == 0
    text = read(tmp_path / "two.html").text
    assert "key seed=0 seed=1 warehouses.shelf.budget" in text
    assert "train.seed" not in text
    assert re.search(r"shelf: cells \d+ \d+", text)
    same = compare([first, first], output=tmp_path / "same.html")
    assert "What is not the same" not in same.html


def test_a_folder_of_runs_is_searched_and_models_are_no_runs(runs: Path, tmp_path: Path) -> None:
    found = find_runs(runs)
    assert len(found) == 5
    assert all((run / "metrics.csv").is_file() for run in found)
    for name in ("run-10", "run-9"):
        write_run(tmp_path / name)
    assert [run.name for run in find_runs(tmp_path)] == ["run-9", "run-10"]


def test_the_folder_of_a_sweep_shows_its_table_and_its_rows_in_their_order(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(runs, folder)
    entries = [
        Entry(name, {"budget": budget}, "pets", (), "", 10 + len(budget), None, 9)
        for name, budget in (("budget=1_2", "1/2"), ("budget=1", "1"))
    ]
    (folder / "sweep.json").write_text(Manifest("pets", "accuracy", (0, 1), tuple(entries)).text())
    for run in folder.glob("*/seed=*"):
        (run / "model/model.safetensors").touch()
    assert kw(folder).exit_code == 0
    text = read(folder / "report.html").text
    assert re.search(r"The sweep budget seeds .* 1/2 2 13 .* 35\.00 ± 7\.07 1 2 11 .* 55\.00 ± 7\.07 \+20\.00", text)
    assert re.search(r"All runs .* budget=1/2 2 .* budget=1 2 ", text)
    (folder / "sweep.json").write_text("{")
    assert "sweep.json is damaged" in kw(folder).stderr


def test_the_mean_is_over_the_runs_that_have_a_place() -> None:
    found = mean_series("a", [Series("x", (1, 2), (0.0, 1.0)), Series("x", (1, 2, 3), (1.0, 1.0, 5.0))])
    assert (found.x, found.y) == ([1, 2, 3], [0.5, 1.0, 5.0])
    assert found.deviation == pytest.approx([0.5**0.5, 0, 0])


def test_mistakes_are_one_line(runs: Path, tmp_path: Path) -> None:
    for arguments, told in (
        ((runs, tmp_path / "nowhere"), "nowhere: no such file or folder"),
        ((runs, "--split", "val"), "--set and --split are for a single run"),
        ((runs / "budget=1", tmp_path), "no run, and none in the folders below"),
    ):
        failed = kw(*arguments)
        assert failed.exit_code == 1
        assert told in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
