"""A sweep of real runs, made in this process: what is kept, what goes on, and what is said."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.errors import RunError
from kw_lightning.fit import fit
from kw_lightning.recipe import load_recipe
from kw_lightning.sweep.grid import Grid, make_grid
from kw_lightning.sweep.processes import Job
from kw_lightning.sweep.run import Outcome, sweep

QUICK = [
    "vars.stem=16",
    "vars.first=16",
    "vars.second=16",
    "data.train.samples=60",
    "data.eval.samples=40",
    "data.batch_size=20",
    "train.epochs=1",
    "temperature.epochs=1",
    "log.tensorboard=false",
    "log.report=false",
]
BUDGETS = "warehouses.*.budget=1,1/2"


@dataclass
class Ended:
    """A run that has ended."""

    code: int

    def poll(self) -> int:
        return self.code

    def stop(self, number: int) -> None:
        pass

    def end(self) -> None:
        pass


class InProcess:
    """Makes runs by the function that kw-fit calls, but for those of a row that is to fail or to be interrupted."""

    def __init__(self, fails: str = "", interrupts: str = "") -> None:
        self.fails, self.interrupts = fails, interrupts
        self.made: list[tuple[str, int]] = []

    def __call__(self, job: Job, slot: int) -> Ended:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        if job.row == self.interrupts:
            raise KeyboardInterrupt
        if job.row == self.fails:
            job.log.write_text("much\nno space left\n\n")
            return Ended(1)
        _, recipe, change, _, output, _, resume = job.command[3:]
        fit(recipe, [change], output=output, resume=resume)
        self.made.append((job.row, job.seed))
        return Ended(0)


def grid(*more: str, seeds: int = 1) -> Grid:
    return make_grid(["digits-resnet"], [*QUICK, *more], seeds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "budgets"


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> list[str]:
    """What is said by a sweep that is interrupted in its second row."""
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt, match=rf"kw sweep {folder} goes on"):
        sweep(grid(BUDGETS), output=folder, begin=InProcess(interrupts="budget=1-2"), tell=lines.append)
    return lines


@pytest.fixture(scope="module")
def outcome(folder: Path, interrupted: list[str]) -> tuple[Outcome, InProcess, list[str]]:
    """The same sweep, gone on with to its end."""
    launcher, lines = InProcess(), list[str]()
    return sweep(folder, begin=launcher, tell=lines.append), launcher, lines


def test_a_sweep_goes_on_where_it_was_with_finished_runs_kept(
    folder: Path, interrupted: list[str], outcome: tuple[Outcome, InProcess, list[str]]
) -> None:
    found, launcher, lines = outcome
    assert [line.partition(":")[0] for line in interrupted] == [
        "1/2 budget=1, seed 0",
        "1/2 budget=1, seed 0",
        "2/2 budget=1/2, seed 0",
    ]
    assert launcher.made == [("budget=1-2", 0)]
    assert lines[0] == "1 of 2 runs are finished"
    assert found.failed == {}
    assert found.results.missing == []


def test_the_table_has_the_figures_of_the_runs(folder: Path, outcome: tuple[Outcome, InProcess, list[str]]) -> None:
    found = json.loads((folder / "table.json").read_text())
    first, second = found["rows"]
    results = [json.loads((folder / row / "seed=0/result.json").read_text()) for row in ("budget=1", "budget=1-2")]
    for row, result in zip(found["rows"], results, strict=True):
        assert row["parameters"] == result["parameters"]
        assert row["val"]["mean"] == result["val"]["best"]["accuracy"]
        assert row["test"]["mean"] == result["test"]["best"]["accuracy"]
        assert row["multiply_adds"] > 100_000
    assert first["val"]["difference"] is None
    assert second["val"]["difference"]["mean"] == pytest.approx(second["val"]["mean"] - first["val"]["mean"])
    (head, _, *lines) = (folder / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in head.split("|")][1:5] == ["budget", "seeds", "parameters", "multiply-adds"]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "1/2"]
    assert len({len(line) for line in (head, *lines)}) == 1
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["budget"] for row in rows] == ["1", "1/2"]
    assert float(rows[1]["val_mean"]) == second["val"]["mean"]
    assert (rows[0]["val_difference"], rows[1]["val_low"]) == ("", "")


def test_the_chart_names_its_rows(folder: Path, outcome: tuple[Outcome, InProcess, list[str]]) -> None:
    drawn = (folder / "accuracy.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "budget=1/2" in drawn
    assert "test accuracy, %" in drawn


def test_the_table_is_printed_without_running(folder: Path, outcome: tuple[Outcome, InProcess, list[str]]) -> None:
    printed = CliRunner().invoke(application(), ["sweep", str(folder), "--table"])
    assert printed.exit_code == 0, printed.output
    assert (folder / "table.md").read_text().strip() in printed.stdout
    as_json = CliRunner().invoke(application(), ["sweep", str(folder), "--table", "--json"])
    assert json.loads(as_json.stdout) == json.loads((folder / "table.json").read_text())


def test_a_grown_grid_is_said_and_a_failed_run_does_not_end_the_others(
    folder: Path, outcome: tuple[Outcome, InProcess, list[str]], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder, tmp_path / folder.name)  # other tests look at it as it was
    launcher, lines = InProcess(fails="budget=3-4"), list[str]()
    grown = grid("warehouses.*.budget=3/4,1/2")
    found = sweep(grown, output=folder, begin=launcher, tell=lines.append)
    assert lines[:2] == [
        "the grid has changed: 1 new rows; 1 are no longer in it: their runs stay, and the table leaves them out",
        "1 of 2 runs are finished",
    ]
    assert lines[3].startswith("1/1 budget=3/4, seed 0: failed with exit code 1: no space left (all of it: ")
    assert found.failed == {("budget=3-4", 0): "no space left"}
    assert found.results.missing == [("budget=3/4", 0)]
    assert [line.split("|")[2].strip() for line in (folder / "table.md").read_text().splitlines()[2:]] == ["0", "1"]
    assert (folder / "budget=1/seed=0/result.json").exists()


def test_a_changed_recipe_is_refused_where_it_has_runs(
    folder: Path, outcome: tuple[Outcome, InProcess, list[str]]
) -> None:
    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}

    before = times()
    with pytest.raises(RunError, match=r"another recipe: budget=1: train\.epochs \(1 → 7\), and 1 more rows"):
        sweep(grid(BUDGETS, "train.epochs=7"), output=folder, begin=InProcess())
    assert times() == before


def test_the_recipes_of_a_sweep_are_frozen_until_a_run_has_begun(tmp_path: Path) -> None:
    own = tmp_path / "net.yaml"
    launcher = InProcess(interrupts="net")
    for epochs in (3, 4):  # nothing was trained with 3
        own.write_text(f"kw: 1\nextends: digits-resnet\ntrain: {{epochs: {epochs}}}\n")
        with pytest.raises(KeyboardInterrupt):
            sweep(make_grid([str(own)], []), output=tmp_path / "out", begin=launcher)
    own.unlink()
    frozen = load_recipe(tmp_path / "out/recipes/net.yaml")
    assert frozen.train is not None
    assert frozen.train.epochs == 4
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "out", begin=launcher)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train.epochs=1,2"], 2, "a recipe, or the folder of a sweep, is needed"),
        (["digits-resnet", "train.epoch=1,2"], 2, 'did you mean "epochs"?'),
        (["digits-resnet", "warehouses.stage1.layers=[stem],[stm]"], 2, "(row layers=[stm])"),
        (["digits-resnet", "train.optimizer.name=SGD,Adm", "--seeds", "2"], 2, 'did you mean "Adam"?'),
        (["digits-resnet", "train.freeze=[stem],[stm]"], 2, "train.freeze"),
        (["."], 1, "no sweep.json in this folder"),
        ([".", "train.epochs=1,2"], 2, "is a folder"),
        (["digits-resnet", "train.epochs=1,2", "--output", "other"], 1, "other is not empty and holds no sweep"),
        (["digits-resnet", "--launcher", "slrm"], 1, 'did you mean "slurm"?'),
        (["digits-resnet", "--with", "num_gpus=1"], 1, "--with is for --launcher slurm and ray"),
        (["digits-resnet", "--table"], 1, "runs/digits-resnet-sweep: no such folder"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").touch()
    result = CliRunner().invoke(application(), ["sweep", *arguments])
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()
