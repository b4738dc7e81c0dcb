"""Trackers besides metrics.csv: their arguments, missing packages, and each offline where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit import fit
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.trackers import CLASSES, IDENTITIES, check_trackers, make_trackers
from kw_lightning.fit.trainer import make_loggers
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

OFFLINE: dict[str, dict[str, Any]] = {
    "wandb": {"offline": True, "project": "pets"},
    "mlflow": {},
    "trackio": {"project": "pets"},
}


def recipe(**trackers: object) -> Recipe:
    return load_recipe({"kw": 1, "extends": "digits-resnet", "log": trackers})


@pytest.mark.parametrize("name", CLASSES)
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kw_lightning.fit.trackers.find_spec", lambda _: None)
    with pytest.raises(RunError, match=rf"log\.{name} needs {name}: pip install 'kw-lightning\[{name}\]'"):
        fit(recipe(**{name: {}}), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="AdamX"):  # mistakes of the recipe come first
        fit("digits-resnet", [f"log.{name}={{}}", "train.optimizer.name=AdamX"], output=tmp_path / "run")


def test_a_run_without_tensorboard_goes_on_and_says_so_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    assert [type(logger).__name__ for logger in make_loggers(recipe(), folder)] == ["MetricsTable", "TensorBoardLogger"]
    monkeypatch.setattr("kw_lightning.fit.trackers.find_spec", lambda _: None)
    assert [type(logger).__name__ for logger in make_loggers(recipe(), folder)] == ["MetricsTable"]
    assert caplog.messages == []
    assert len(make_loggers(recipe(tensorboard=True), folder)) == 1
    (told,) = caplog.messages
    assert "pip install 'kw-lightning[tensorboard]'" in told


def test_unknown_arguments_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        check_trackers(recipe(wandb={"projekt": "a", "save_dir": "/"}, mlflow={"run_nam": "b"}, trackio={"space": "c"}))
    told = [str(problem) for problem in caught.value.problems]
    assert 'log.wandb.projekt: found the unknown argument "projekt"' in told[0]
    assert 'did you mean "project"?' in told[0]
    assert "log.wandb.save_dir: " in told[1]
    assert 'did you mean "run_name"?' in told[2]
    assert 'allowed: project, space_id, name; did you mean "space_id"?' in told[3]


def test_a_tracker_that_fails_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("no route to the host\nand more")

    monkeypatch.setattr("kw_lightning.fit.trackers.MLFlowLogger", fail)
    with pytest.raises(RunError, match=r"^log\.mlflow: ConnectionError: no route to the host$"):
        make_trackers(recipe(mlflow={}), RunFolder(tmp_path))


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_is_tracked_offline_and_gone_on_with(
    name: str, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = [
        *quick,
        "log.tensorboard=false",
        f"log.{name}={json.dumps(OFFLINE[name])}",
        "train.schedule.name=constant",
    ]
    fit("digits-resnet", [*options, "train.epochs=1", "log.report=true"], output=tmp_path / "run")
    pictures = {picture.name.partition("_")[0].partition("-")[0] for picture in tmp_path.rglob("*.png")}
    named = {"confusion", "stage1", "stage2"} <= pictures
    assert len(pictures) == 5 if name == "trackio" else named  # Trackio gives them names of its own
    before = json.loads((tmp_path / "run" / IDENTITIES).read_text())[name]
    assert before
    fit("digits-resnet", options, resume=tmp_path / "run")
    assert json.loads((tmp_path / "run" / IDENTITIES).read_text())[name] == before
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        history = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}").get_metric_history(before, "val/accuracy")
        assert [metric.step for metric in history] == [2, 5]
    elif name == "wandb":
        import wandb

        assert wandb.run is None  # the next run in this process is another one
        assert len(list((tmp_path / "run/wandb").glob(f"offline-run-*{before}"))) >= 1
    else:
        assert list((tmp_path / "trackio").rglob("pets*"))
