"""A run that is stopped anywhere goes on to the bit: signals, checkpoints inside an epoch, accumulation, averages."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kw_lightning.callbacks import InterruptedRunError
from kw_lightning.callbacks.signals import StopSignals
from kw_lightning.fit import Classifier, Result, fit
from kw_lightning.fit.data.module import ImageData

OPTIONS = ["log.tensorboard=false", "data.train.noise=0.1", "train.monitor=train/loss", "data.eval_batch_size=10"]
HARD = [
    "train.accumulate=2",
    "train.ema.decay=0.9",
    "train.mixup=0.5",
    "data.batch_size=12",
    "data.eval_batch_size=10",
]  # 5 batches, 3 steps


def everything(folder: Path) -> dict[str, Any]:
    """Return all that a run ends with, but its paths."""
    found: dict[str, Any] = {}
    for name in ("last", "best"):
        state = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            found[f"{name} {part}"] = state.get(part)
        found[f"{name} step"] = state["global_step"]
        found[f"{name} metrics"] = state["exact_checkpoint"]["metrics"]
    return found


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def signalled(number: signal.Signals, original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that sends this process a signal before it does its work."""

    def function(*args: Any, **options: Any) -> Any:
        if when(*args):
            os.kill(os.getpid(), number)
        return original(*args, **options)

    return function


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Result:
    from quick_run import QUICK

    return fit("digits-resnet", [*QUICK, *OPTIONS, *HARD], output=tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.mark.parametrize("batch", range(10))
def test_ctrl_c_in_any_batch_goes_on_to_the_bit(
    tmp_path: Path, quick: list[str], unbroken: Result, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    count = iter(range(100))
    step = signalled(signal.SIGINT, Classifier.training_step, lambda *_: next(count) == batch)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", step)
        with pytest.raises(KeyboardInterrupt, match=r"after step \d; .*: go on with resume="):
            fit("digits-resnet", [*quick, *OPTIONS, *HARD], output=tmp_path / "run")
    fit("digits-resnet", [*quick, *OPTIONS, *HARD], resume=tmp_path / "run")
    assert_same(everything(tmp_path / "run"), everything(unbroken.folder))


def test_a_signal_while_a_batch_is_fetched_or_evaluated_waits_for_an_exact_place(
    tmp_path: Path, quick: list[str], unbroken: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*quick, *OPTIONS, *HARD]
    count = iter(range(1000))
    fetch = signalled(signal.SIGTERM, ImageData.on_after_batch_transfer, lambda *_: next(count) == 3)
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "on_after_batch_transfer", fetch)
        with pytest.raises(InterruptedRunError, match="after step 2") as stopped:
            fit("digits-resnet", options, output=tmp_path / "run")
        assert stopped.value.exit_code == 143
    evaluation = signalled(signal.SIGINT, Classifier.validation_step, lambda *_: True)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validation_step", evaluation)
        # every batch of the evaluation sends one; a second Ctrl-C does not wait
        with pytest.raises(KeyboardInterrupt, match=r"Interrupted; resume=.* goes on from the last checkpoint"):
            fit("digits-resnet", options, resume=tmp_path / "run")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    first = iter([True])
    evaluation = signalled(signal.SIGINT, Classifier.validation_step, lambda *_: next(first, False))
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validation_step", evaluation)
        with pytest.raises(KeyboardInterrupt, match="after step 3"):
            fit("digits-resnet", options, resume=tmp_path / "run")
    fit("digits-resnet", options, resume=tmp_path / "run")
    assert_same(everything(tmp_path / "run"), everything(unbroken.folder))


def test_ctrl_c_when_all_is_trained_says_how_to_go_on(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kw_lightning.inference import ImageClassifier

    with monkeypatch.context() as patch:
        writing = signalled(signal.SIGINT, ImageClassifier.save_pretrained, lambda *_: True)
        patch.setattr(ImageClassifier, "save_pretrained", writing)
        with pytest.raises(KeyboardInterrupt, match=r"Interrupted; resume=.* goes on from the last checkpoint"):
            fit("digits-resnet", [*quick, *OPTIONS], output=tmp_path / "run")
    assert fit("digits-resnet", [*quick, *OPTIONS], resume=tmp_path / "run").test
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("every", ["{steps: 1}", "{minutes: 0.00001}"])
def test_checkpoints_inside_an_epoch_go_on_to_the_bit_after_a_failure(
    tmp_path: Path, quick: list[str], unbroken: Result, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    options = [*quick, *OPTIONS, *HARD, f"train.checkpoint_every={every}"]
    original = Classifier.training_step

    def failing(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.current_epoch == 1 and index == 3:
            raise RuntimeError("something broke")
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", failing)
        with pytest.raises(RuntimeError, match="something broke"):
            fit("digits-resnet", options, output=tmp_path / "run")
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert (state["global_step"], state["epoch"]) == (4, 1)
    fit("digits-resnet", options, resume=tmp_path / "run")
    assert_same(everything(tmp_path / "run"), everything(unbroken.folder))


def test_nohup_lets_a_run_go_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignals((signal.SIGTERM, signal.SIGHUP))
    stop.catch()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.wanted == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted == signal.SIGTERM
    finally:
        stop.release()
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_the_signals_belong_to_their_owner_again(tmp_path: Path, quick: list[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit("digits-resnet", [*quick, *OPTIONS], output=tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
