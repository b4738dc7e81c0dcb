"""Where a run starts: requeued jobs, damaged checkpoints, folders of others."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kw_lightning
from kw_lightning import load_recipe
from kw_lightning.errors import RunError
from kw_lightning.fit import evaluate, fit
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.starting import last_good, start
from kw_lightning.recipe import lock_text

RECIPE = load_recipe("digits-resnet")


def begun(folder: Path) -> RunFolder:
    """Return the folder of a run that was killed before its first checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "tensorboard").mkdir()
    for name in ("metrics.csv", "versions.json", ".lock", ".result.json.partial", "checkpoints/.last.ckpt.7.partial"):
        (folder / name).write_text("x")
    (folder / "recipe.lock.yaml").write_text(lock_text(RECIPE))
    return RunFolder(folder)


def test_a_requeued_job_starts_anew_before_its_first_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    found = start(RECIPE, "auto", tmp_path / "run")
    assert (found.checkpoint, found.state) == (None, None)
    assert [path.name for path in found.folder.path.iterdir()] == [".lock"]
    with pytest.raises(RunError, match="another process"):
        start(RECIPE, "auto", tmp_path / "run")
    found.folder.release()


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: fit(RECIPE, resume=True), "bool"),  # type: ignore[arg-type]
        (lambda: fit(RECIPE, init=True), "bool"),  # type: ignore[arg-type]
        (lambda: fit(RECIPE, output=3), "int"),  # type: ignore[arg-type]
        (lambda: evaluate(None), "NoneType"),  # type: ignore[arg-type]
        (lambda: kw_lightning.load(3), "int"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"^found an object of {found} in the place of a path, allowed: a string or a"):
        call()
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_folder_of_another_recipe_or_with_other_files_is_left_alone(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a run of another recipe, without a checkpoint.*output=…"):
        start(load_recipe("digits-resnet", ["train.epochs=7"]), "auto", tmp_path / "run")
    (tmp_path / "run/thesis.tex").write_text("…")
    with pytest.raises(RunError, match="is not empty"):
        start(RECIPE, "auto", tmp_path / "run")
    assert (tmp_path / "run/metrics.csv").exists()
    with pytest.raises(RunError, match="is not empty"):
        start(RECIPE, None, tmp_path / "run")


def test_auto_takes_the_last_good_checkpoint_and_says_so(
    tmp_path: Path, quick: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = fit("digits-resnet", [*quick, "log.tensorboard=false"], output=tmp_path / "run")
    folder = RunFolder(result.folder)
    content = bytearray(folder.last.read_bytes())
    content[len(content) // 2] ^= 1
    folder.last.write_bytes(content)
    with pytest.raises(RunError, match=r"last\.ckpt: not a checkpoint, or a damaged one"):
        fit("digits-resnet", quick, resume=tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        found = last_good(folder)
    assert found is not None
    assert found[0] == folder.best
    assert "damaged one (the checksum" in caplog.text
    assert f"Going on from {folder.best}, step" in caplog.text
    assert fit("digits-resnet", [*quick, "log.tensorboard=false"], output=tmp_path / "run", resume="auto").last
    folder.last.write_bytes(b"")
    folder.best.write_bytes(b"")
    with pytest.raises(RunError, match="No good checkpoint is left"):
        last_good(folder)


def test_a_damaged_best_checkpoint_is_told_before_the_run_goes_on(
    tmp_path: Path, quick: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*quick, "log.tensorboard=false"]
    folder = RunFolder(fit("digits-resnet", settings, output=tmp_path / "run").folder)
    folder.best.write_bytes(folder.best.read_bytes()[:-100])
    more = [*settings, "train.epochs=3"]
    with pytest.raises(RunError, match=r"best\.ckpt: not a checkpoint, or a damaged one.* among the epochs to come"):
        fit("digits-resnet", more, resume=folder.path)
    with caplog.at_level(logging.WARNING):
        result = fit("digits-resnet", more, resume="auto", output=folder.path)
    assert "best.ckpt.damaged now, and the best is chosen" in caplog.text
    assert result.best == result.last  # of the one epoch to come


def test_a_best_checkpoint_is_kept_where_the_folder_is_moved_and_chosen_anew_where_it_is_gone(
    tmp_path: Path, quick: list[str]
) -> None:
    settings = [*quick, "log.tensorboard=false", "train.monitor=val/top5"]
    first = fit("digits-resnet", settings, output=tmp_path / "run")
    state = torch.load(RunFolder(first.folder).last, weights_only=True)
    (name,) = (name for name in state["callbacks"] if name.startswith("ModelCheckpoint{"))  # as Lightning names it
    found = state["callbacks"][name]
    found["best_model_score"] = found["best_k_models"][found["best_model_path"]] = torch.tensor(2.0)  # not to be passed
    torch.save(state, RunFolder(first.folder).last)
    moved = RunFolder(first.folder.rename(tmp_path / "moved"))
    best = moved.best.read_bytes()
    fit("digits-resnet", [*settings, "train.epochs=3"], resume=moved.path)
    assert moved.best.read_bytes() == best
    moved.best.unlink()
    result = fit("digits-resnet", [*settings, "train.epochs=4"], resume=moved.path)
    assert moved.best.is_file()
    assert result.best == result.last


def test_a_folder_that_is_moved_while_its_run_is_at_work_is_told(
    tmp_path: Path, quick: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def move() -> None:
        while not (tmp_path / "run/checkpoints/last.ckpt").exists():
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "moved")

    thread = threading.Thread(target=move)
    thread.start()
    with pytest.raises(RunError, match="run was moved or removed while its run was at work; resume=… and its new"):
        fit("digits-resnet", [*quick, "train.epochs=500"], output=tmp_path / "run")
    thread.join()
    assert "Traceback" not in capfd.readouterr().err  # of TensorBoard's thread
    assert RunFolder(tmp_path / "moved").last.is_file()


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    run = os.fork()
    if run == 0:
        folder = RunFolder(tmp_path / "run")
        folder.claim(resume=True)
        if os.fork() == 0:
            time.sleep(30)  # as a DataLoader's worker for some seconds
        (tmp_path / "claimed").touch()
        time.sleep(30)
        os._exit(0)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    with pytest.raises(RunError, match="another process"):
        RunFolder(tmp_path / "run").claim(resume=True)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    RunFolder(tmp_path / "run").claim(resume=True)


def test_what_a_kill_left_unfinished_is_removed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    folder.claim(resume=True)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_checkpoint_with_a_strange_inside_is_one_message(tmp_path: Path, quick: list[str]) -> None:
    settings = [*quick, "log.tensorboard=false"]
    last = RunFolder(fit("digits-resnet", settings, output=tmp_path / "run").folder).last
    whole = torch.load(last, weights_only=True)
    strange: dict[str, Any] = {
        "loops": {},
        "optimizer_states": [3],
        "exact_checkpoint": 7,
        "callbacks": {"RandomState": {"processes": [0]}, "TemperatureAnnealing": None},
    }
    for key, value in strange.items():
        torch.save({**whole, key: value}, tmp_path / "strange.ckpt")
        with pytest.raises(RunError, match=r"strange\.ckpt cannot be resumed: .*init=") as caught:
            fit("digits-resnet", [*settings, "train.epochs=3"], resume=tmp_path / "strange.ckpt")
        assert len(str(caught.value).splitlines()) == 1, key


def test_memory_that_is_too_small_for_the_first_image_is_told_as_that(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 EiB, which no computer has: the allocator's own error
    monkeypatch.setattr(Classifier, "forward", lambda self, images: torch.empty(2**60))
    with pytest.raises(RunError, match="memory is too small for this run"):
        fit("digits-resnet", quick, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
