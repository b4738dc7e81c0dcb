"""`kw sweep` as a user runs it, in processes: stopped, killed, gone on with, to the bit of one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep_run import QUICK

SETTINGS = ["digits-resnet", *QUICK[:6], "train.epochs=60", "temperature.epochs=2", "log.tensorboard=false"]
GRID = ["train.optimizer.lr=0.01,0.003", "--jobs", "2"]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kw_lightning.cli", "sweep", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(text: str, logs: list[Path]) -> None:
    for _ in range(12_000):
        if all(log.exists() and text in log.read_text() for log in logs):
            return
        time.sleep(0.02)
    raise AssertionError(f"{text} is in none of {logs}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_was_stopped_and_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = started(tmp_path, *SETTINGS, *GRID, "--output", "whole")
    _, errors = whole.communicate(timeout=280)
    assert whole.returncode == 0, errors
    out = tmp_path / "broken"
    first = [out / f"lr={rate}/seed=0.log" for rate in ("0.01", "0.003")]

    process = started(tmp_path, *SETTINGS, *GRID, "--output", "broken")
    wait_for("epoch 3/60", first)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.count(": interrupted") == 2
    assert "Interrupted; kw sweep broken goes on" in errors
    assert "Traceback" not in errors
    assert all((log.with_suffix("") / "checkpoints/last.ckpt").exists() for log in first)

    process = started(tmp_path, *SETTINGS, *GRID, "--output", "broken")
    wait_for("epoch 7/60", first)
    process.kill()  # its runs notice, and write their checkpoints
    process.communicate(timeout=120)

    process = started(tmp_path, "broken")
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert errors.count("goes on") == 2, errors
    results = [
        [json.loads((tmp_path / name / f"lr={rate}/seed=0/result.json").read_text()) for rate in ("0.01", "0.003")]
        for name in ("whole", "broken")
    ]
    assert len(results[0]) == 2
    assert results[0] == results[1]
    assert (tmp_path / "whole/table.md").read_text() == (tmp_path / "broken/table.md").read_text()
    assert printed.strip() == (tmp_path / "whole/table.md").read_text().strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_fails_is_told_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """A learning rate far too large: its loss is soon no number."""
    process = started(tmp_path, *SETTINGS, "train.optimizer.lr=1e6,0.01", "train.optimizer.name=SGD", "--output", "out")
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 1, errors
    assert "1/2 lr=1e6, seed 0: failed with exit code" in errors
    assert "not finished: lr=1e6, seed 0" in errors
    assert printed.splitlines()[-1 - printed.endswith("\n\n")].startswith("| 0.01")
