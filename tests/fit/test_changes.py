"""What a resume may change, key by key, what is refused, and the lock that tells of it; new runs from old weights."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kw_lightning import load_recipe
from kw_lightning.errors import RunError
from kw_lightning.fit import Result, fit
from kw_lightning.fit.resuming import lock_history

OPTIONS = ["log.tensorboard=false", "train.epochs=2", "train.schedule.warmup_epochs=0.5"]


@pytest.fixture
def run(tmp_path: Path, quick: list[str]) -> Result:
    return fit("digits-resnet", [*quick, *OPTIONS], output=tmp_path / "run")


def rates(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["lr-AdamW"]) for row in csv.DictReader(file)]


def lock(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "recipe.lock.yaml").read_text())
    return found


def test_a_changed_schedule_goes_on_as_if_it_had_been_so_from_the_beginning(
    run: Result, tmp_path: Path, quick: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = rates(run.folder)
    changes = [
        "train.epochs=4",
        "train.optimizer.lr=0.1",
        "train.optimizer.weight_decay=0.3",
        "train.schedule.name=linear",
    ]
    options = [*quick, *OPTIONS, *changes]
    with caplog.at_level(logging.WARNING):
        fit("digits-resnet", options, resume=run.folder)
    assert "resumed after step 6 with other settings: " in caplog.text
    assert "train.epochs (2 → 4)" in caplog.text
    unbroken = fit("digits-resnet", options, output=tmp_path / "unbroken")
    found, expected = rates(run.folder), rates(unbroken.folder)
    assert found[:6] == before
    assert found[6:] == pytest.approx(expected[6:])
    assert max(found[6:]) > 0.04
    state = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)
    assert {group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]} <= {0.3, 0.0}
    assert 0.3 in {group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]}
    written = lock(run.folder)
    assert written["train"]["optimizer"]["lr"] == 0.1
    (entry,) = written["lock"]["history"]
    assert entry["step"] == 6
    assert "train.epochs (2 → 4)" in entry["changed"]
    assert load_recipe(run.folder / "recipe.lock.yaml").train == load_recipe("digits-resnet", options).train
    fit("digits-resnet", [*options, "train.epochs=5"], resume=run.folder)
    assert [entry["step"] for entry in lock(run.folder)["lock"]["history"]] == [6, 12]


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_a_schedule_of_another_kind_is_applied(run: Result, quick: list[str], schedule: str) -> None:
    options = [*quick, *OPTIONS, "train.epochs=3", f"train.schedule={{name: {schedule}, warmup_epochs: 0}}"]
    fit("digits-resnet", options, resume=run.folder)
    assert rates(run.folder)[6:] == pytest.approx([run.module.recipe.train.optimizer.lr] * 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.optimizer.name=SGD", r"cannot change: train\.optimizer\.name \(AdamW → SGD\).*init="),
        ("data.batch_size=10", r"data\.batch_size \(20 → 10\)"),
        ("defaults.budget=2", r"is of another network than the recipe's.*in a new folder"),
        ("train.seed=3", r"train\.seed \(0 → 3\)"),
        ("train.epochs=1", r"has 2 epochs behind it: train\.epochs is 1"),
        ("train.max_steps=4", r"has 6 steps behind it: train\.max_steps is 4"),
    ],
)
def test_what_a_resume_cannot_change_is_refused_and_nothing_is_written(
    run: Result, quick: list[str], change: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=message):
        fit("digits-resnet", [*quick, *OPTIONS, change], resume=run.folder)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_the_lock_of_a_run_that_does_not_train_keeps_its_values(run: Result, quick: list[str]) -> None:
    before = (run.folder / "recipe.lock.yaml").read_bytes()
    fit("digits-resnet", [*quick, *OPTIONS, "train.optimizer.lr=0.5"], resume=run.folder)  # both epochs are done
    assert (run.folder / "recipe.lock.yaml").read_bytes() == before
    fit("digits-resnet", [*quick, *OPTIONS, "data.eval_batch_size=7"], resume=run.folder)
    assert (run.folder / "recipe.lock.yaml").read_bytes() == before


def test_a_damaged_lock_has_no_history(tmp_path: Path) -> None:
    from kw_lightning.fit.folder import RunFolder

    for content in (b"\xff", b"[1", b"lock: 3", b""):
        (tmp_path / "recipe.lock.yaml").write_bytes(content)
        assert lock_history(RunFolder(tmp_path)) == []


def test_a_new_run_begins_with_the_weights_of_another(run: Result, tmp_path: Path, quick: list[str]) -> None:
    options = [*quick, *OPTIONS, "train.optimizer={name: SGD, lr: 0}", "train.optimizer.weight_decay=0", "train.seed=9"]
    for resume in (None, "auto"):
        new = fit("digits-resnet", options, init=run.folder, output=tmp_path / f"new-{resume}", resume=resume)
        trained = dict(new.module.named_parameters())
        source = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, source[name]) for name, value in trained.items())
        assert torch.load(new.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
        assert "history" not in lock(new.folder)["lock"]
        # The images that the weights were trained on do not validate them, whatever the seed.
        assert (new.folder / "split.json").read_text() == (run.folder / "split.json").read_text()
    with pytest.raises(RunError, match="is of another network than the recipe's"):
        fit("digits-resnet", [*options, "defaults.budget=2"], init=run.folder, output=tmp_path / "other")
    with pytest.raises(RunError, match="give one of them"):
        fit("digits-resnet", options, init=run.folder, resume=run.folder)
