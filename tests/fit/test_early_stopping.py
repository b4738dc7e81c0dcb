"""Early stopping: where a run ends, what a resume makes of it, and what is said."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kw_lightning.errors import RecipeError
from kw_lightning.fit import Classifier, Result, fit
from kw_lightning.fit.early_stopping import check_stopping
from kw_lightning.fit.report import metrics_table
from kw_lightning.recipe import load_recipe

OPTIONS = [
    "log.tensorboard=false",
    "train.epochs=9",
    "train.optimizer={name: SGD, lr: 0}",  # nothing gets better, so the run ends after the first epoch and 2 more
    "train.early_stop={patience: 2}",
    "train.monitor=train/loss",
    "train.early_stop.min_delta=5",
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Result:
    from quick_run import QUICK

    return fit("digits-resnet", [*QUICK, *OPTIONS], output=tmp_path_factory.mktemp("runs") / "unbroken")


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return found


def test_a_run_ends_when_patience_does_and_says_where_the_schedule_stood(unbroken: Result) -> None:
    assert state(unbroken.folder)["epoch"] == 2
    assert unbroken.note is not None
    assert unbroken.note.startswith("stopped early, after epoch 3 of 9: train/loss was best, ")
    assert "2 epochs before; the schedule of the learning rate did not come to its end, it stood at 0" in unbroken.note
    screen = Console(width=80)
    with screen.capture() as shown:
        screen.print(metrics_table({"val, last": unbroken.last}, unbroken.note))
    assert "stopped early" in shown.get()


def test_a_stopped_run_goes_on_to_the_bits_and_the_end_of_an_unbroken_one(
    unbroken: Result, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == 7:  # inside the third epoch, one without getting better behind it
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("digits-resnet", [*quick, *OPTIONS], output=tmp_path / "run")
    resumed = fit("digits-resnet", [*quick, *OPTIONS], resume=tmp_path / "run")
    again = fit("digits-resnet", [*quick, *OPTIONS], resume=tmp_path / "run")  # it has ended: not an epoch more
    for result in (resumed, again):
        found, expected = state(result.folder), state(unbroken.folder)
        assert found["global_step"] == expected["global_step"] == 9
        assert all(torch.equal(value, expected["state_dict"][key]) for key, value in found["state_dict"].items())
        assert result.note == unbroken.note


def test_a_resume_with_more_patience_goes_on(unbroken: Result, tmp_path: Path, quick: list[str]) -> None:
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")  # other tests look at it as it was
    result = fit("digits-resnet", [*quick, *OPTIONS, "train.early_stop.patience=3"], resume=folder)
    assert state(result.folder)["epoch"] == 3
    assert result.note is not None
    assert "after epoch 4 of 9" in result.note


def test_without_validation_images_there_is_nothing_to_look_at() -> None:
    recipe = load_recipe("digits-resnet", ["train.early_stop={patience: 2}", "train.monitor=val/accuracy"])
    check_stopping(recipe, ("train", "val"))
    with pytest.raises(RecipeError, match=r"train\.early_stop: .*val/accuracy.*no validation part.*data\.validation"):
        check_stopping(recipe, ("train", "test"))
    check_stopping(load_recipe("digits-resnet", ["train.early_stop={}", "train.monitor=train/loss"]), ("train",))
