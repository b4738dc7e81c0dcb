"""A run of `max_steps` that is killed between its epochs, or at its end, goes on to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quick_run import QUICK
from test_stopping import assert_same, everything

from kw_lightning.fit import Result, fit
from kw_lightning.fit.evaluation import read_checkpoint

CALLBACK = """\
import os, signal
from lightning.pytorch import Callback

class Killed(Callback):
    def setup(self, trainer, pl_module, stage):
        hook, _, epoch = os.environ.get("KILLED", "").partition(" ")
        if hook:
            setattr(self, hook, lambda *_: trainer.current_epoch == int(epoch) and os.kill(os.getpid(), signal.SIGKILL))
"""
OPTIONS = [
    *QUICK,
    "train.epochs=9",
    "train.max_steps=8",  # two epochs of three steps, and two of the third
    "data.train.noise=0.1",
    "train.ema.decay=0.9",
    "train.monitor=val/loss",
    "log.tensorboard=false",
    "callbacks=['python:killed_between_epochs:Killed']",
]


PACKAGE = "killed_between_epochs"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the package of the callback, which can be imported."""
    folder = tmp_path_factory.mktemp("package")
    (folder / f"{PACKAGE}.py").write_text(CALLBACK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def whole(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return the run that nothing ends before its end."""
    return fit("digits-resnet", OPTIONS, output=tmp_path_factory.mktemp("runs") / "whole", allow_python=[PACKAGE])


@pytest.mark.parametrize(
    ("moment", "step"),
    [("on_train_epoch_start 1", 3), ("on_train_epoch_start 2", 6), ("on_validation_start 2", 6), ("on_train_end 3", 8)],
)
def test_a_run_of_steps_that_is_killed_goes_on_to_the_bit(
    tmp_path: Path, package: Path, whole: Result, moment: str, step: int
) -> None:
    path = os.pathsep.join([str(package), str(Path(__file__).parents[2])])
    killed = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("fit_script.py")), "digits-resnet", *OPTIONS),
            *("--allow-python", PACKAGE, "--output", "run"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "KILLED": moment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == step
    again = fit("digits-resnet", OPTIONS, output=tmp_path / "run", resume="auto", allow_python=[PACKAGE])
    assert again.test == whole.test
    assert_same(everything(again.folder), everything(whole.folder))
    assert (again.folder / "metrics.csv").read_text() == (whole.folder / "metrics.csv").read_text()
