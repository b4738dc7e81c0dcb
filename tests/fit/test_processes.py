"""Runs in processes of their own: two that stop together, and runs that are killed at random moments."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quick_run import QUICK
from test_stopping import assert_same, everything

from kw_lightning.fit.evaluation import read_checkpoint

COMMAND = [sys.executable, str(Path(__file__).with_name("fit_script.py")), "digits-resnet", *QUICK]
TWO = ["train.accelerator=cpu", "train.devices=2", "data.batch_size=10"]
KINDS = {
    "plain": [],
    "mixup": ["train.mixup=0.8", "train.cutmix=1"],
    "average": ["train.ema.decay=0.9", "train.accumulate=2", "data.batch_size=12"],
    "two processes": TWO,
    "inside epochs": ["train.checkpoint_every={steps: 1}", "data.train.noise=0.1"],
}
MOMENTS = int(os.environ.get("KW_KILLS", "50"))


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*COMMAND, "log.tensorboard=false", *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("number", "both", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C, which a terminal sends to both
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, True, 129),
    ],
)
def test_two_processes_stop_together_with_one_message_and_one_checkpoint(
    tmp_path: Path, number: signal.Signals, both: bool, code: int
) -> None:
    process = started(tmp_path, *TWO, "train.epochs=1000", "--output", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    sent = time.monotonic()
    (os.killpg if both else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)  # the second process has the same streams: it has ended, too
    assert time.monotonic() - sent < 30
    assert process.returncode == code, errors
    assert errors.count("Interrupted after step") == 1, errors
    assert "Traceback" not in errors
    assert "go on with --resume out" in errors
    assert [path.name for path in (tmp_path / "out/checkpoints").glob("last*")] == ["last.ckpt"]


def test_two_processes_warn_once(tmp_path: Path) -> None:
    process = started(tmp_path, *TWO, "train.epochs=1", "train.schedule.warmup_epochs=2", "--output", "out")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("the learning rate is still rising when the run ends, after 1 epoch") == 1, errors


def test_a_terminal_that_is_closed_stops_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "train.epochs=1000", "--output", "out"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    shown = b""
    while b"epoch 2/" not in shown:
        shown += os.read(screen, 4096)
    os.close(screen)
    assert process.wait(60) > 0  # the signal alone would have ended it, below 0
    assert read_checkpoint(tmp_path / "out/checkpoints/last.ckpt")["epoch"] >= 1


def take_memory(process: subprocess.Popen[str]) -> None:
    """Let a process have no more memory than it has already."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    resource.prlimit(process.pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


def kill_workers(process: subprocess.Popen[str]) -> None:
    """End the processes that read images."""
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(number), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (take_memory, "the computer's memory is too small for this run; make data.batch_size smaller"),
        (kill_workers, "a process that reads images was ended from outside"),
    ],
)
def test_a_run_without_memory_or_workers_ends_in_one_line_and_loses_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[subprocess.Popen[str]], None], message: str
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # every larger tensor asks the system for memory
    process = started(tmp_path, "train.epochs=1000", "data.batch_size=60", "data.workers=1", "--output", "out")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    fault(process)
    epochs, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert errors.startswith(message), errors
    assert errors.count("\n") == 1, errors
    told = 2 + epochs.count("epoch ")  # of one step each; an epoch is told just before it is saved
    assert read_checkpoint(tmp_path / "out/checkpoints/last.ckpt")["global_step"] in (told - 1, told)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_the_processes_of_torchrun_share_one_numbered_folder(tmp_path: Path) -> None:
    options = ["digits-resnet", *QUICK, "train.accelerator=cpu", "train.devices=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for epochs, more in ((1, []), (2, ["--resume", "auto"])):
        command = [*torchrun, "-m", "kw_lightning", "fit", *options, f"train.epochs={epochs}", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("run folder: runs/digits-resnet-1") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-resnet-1"]
    table = (tmp_path / "runs/digits-resnet-1/metrics.csv").read_text().splitlines()
    assert len(table) == 5  # a heading, a row for each epoch, and one for the test at the end of each run


@pytest.mark.slow
@pytest.mark.timeout(20_000)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    dice = random.Random(0)
    kills = dict.fromkeys(KINDS, 0)
    for kind, options in KINDS.items():
        begun = time.monotonic()
        assert started(tmp_path, *options, "--output", f"{kind} whole").wait() == 0
        length = time.monotonic() - begun
        while kills[kind] < MOMENTS // len(KINDS):
            folder = f"{kind} {kills[kind]}"
            process = started(tmp_path, *options, "--output", folder, "--resume", "auto")
            time.sleep(dice.uniform(0.3, 0.95) * length)  # training is behind the imports
            ended = process.poll() is not None
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills[kind] += not ended
            again = started(tmp_path, *options, "--output", folder, "--resume", "auto")
            _, errors = again.communicate()
            assert again.returncode == 0, errors
            assert_same(everything(tmp_path / folder), everything(tmp_path / f"{kind} whole"))
            table = (tmp_path / folder / "metrics.csv").read_text()
            assert table == (tmp_path / f"{kind} whole" / "metrics.csv").read_text()
            assert not list((tmp_path / folder).rglob("*.partial"))
    print(f"{sum(kills.values())} SIGKILLs, every run ended with the same bits:", kills)
