"""Names, encodings and pipes that a shell can hand to a command: a line at most, and never a traceback."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kw_lightning.cli.output import console
from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.report import metrics_table

LONG = "a" * 300
FIT = "from kw_lightning.cli import fit_main; fit_main()"
QUICK = [
    "data.train.samples=40",
    "data.eval.samples=20",
    "vars.stem=16",
    "vars.first=16",
    "vars.second=16",
    "log.report=false",
]


def run(folder: Path, name: str, *arguments: str | bytes, **variables: str) -> subprocess.CompletedProcess[str]:
    entry = {"kw": "main", "kw-fit": "fit_main"}[name]
    return subprocess.run(
        [sys.executable, "-c", f"from kw_lightning.cli import {entry}; {entry}()", *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", LONG], "File name too long"),
        (["lock", "digits-resnet", "--output", LONG], "File name too long"),
        (["check", "~nosuchuser/net.yaml"], "there is no such user, whose home ~ means"),
        (["lock", "digits-resnet", "--output", "~nosuchuser/x"], "there is no such user"),
        (["check", "/proc/self/mem"], "cannot be read"),  # a file that not even root can read
        (["check", b"\xff.yaml"], "found the unknown recipe"),
        (["plan", "digits-resnet", b"description=\xff"], "description: found bytes that are not UTF-8"),
    ],
)
def test_odd_names_are_one_line(tmp_path: Path, arguments: list[str | bytes], message: str) -> None:
    result = run(tmp_path, "kw", *arguments)
    said = (result.stderr + result.stdout).strip()
    assert result.returncode in (1, 2)
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["evaluate", LONG], ["evaluate", "~nosuchuser"]])
def test_odd_names_of_runs_are_one_line(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path, "kw", *arguments)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


def without_rights() -> None:
    """Let a program of root be refused what others are: drop the capabilities to read and write everything."""
    drop, override, search = 24, 1, 2  # <linux/prctl.h>, <linux/capability.h>
    libc = ctypes.CDLL(None)
    for capability in (override, search):
        libc.prctl(drop, capability)


@pytest.mark.skipif(sys.platform != "linux", reason="drops capabilities of Linux")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs/locked").mkdir(parents=True)
    (tmp_path / "runs/locked").chmod(0)
    command = [sys.executable, "-c", "from kw_lightning.cli import main; main()", "report", "runs"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=without_rights
    )
    assert (result.returncode, result.stderr) == (1, "runs/locked/metrics.csv: Permission denied\n")


def test_names_in_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    screen = console()
    screen.print("run folder: runs/[red]x")
    screen.print(metrics_table({"[/last]": {"accuracy": 0.5}}))
    shown = capsys.readouterr().out
    assert "runs/[red]x" in shown
    assert "[/last]" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_is_not_utf_8_loses_only_what_it_lacks(tmp_path: Path, encoding: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from kw_lightning.cli import main; main()", "list"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"digits-resnet" in result.stdout
    assert any(character in result.stdout for character in ("×".encode("latin-1"), b"?"))


def test_a_home_in_the_output_is_filled_in(tmp_path: Path) -> None:
    result = run(tmp_path, "kw", "lock", "digits-resnet", "--output=~/locked.yaml", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["locked.yaml"]


def test_an_output_that_nobody_reads_ends_the_run_without_a_word(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FIT, "digits-resnet", *QUICK, "train.epochs=50", "--output=~/run"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert (process.wait(timeout=200), errors) == (128 + signal.SIGPIPE, "")
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()  # what was trained is kept


@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 1, "the output cannot be written: its disk is full, or a quota is reached\n"),
    ],
)
def test_an_output_that_is_closed_or_full_is_no_traceback(tmp_path: Path, where: str, code: int, message: str) -> None:
    if "/dev/full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    line = f'"$0" -c "from kw_lightning.cli import main; main()" show digits-resnet {where}'
    result = subprocess.run(["sh", "-c", line, sys.executable], cwd=tmp_path, capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.decode()) == (code, b"", message)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("train.accelerator=gpu", "No supported gpu backend found"),
        ("train.devices=0", "devices=0"),
        ("train.strategy=deepspeed", "DeepSpeed"),
        ("train.accelerator=tpu", "torch_xla"),
    ],
)
def test_settings_that_this_machine_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, reason: str
) -> None:
    if setting == "train.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"train: Lightning refuses these settings .*{reason}") as caught:
        fit("digits-resnet", [*QUICK, setting])
    assert (caught.value.exit_code, len(str(caught.value).splitlines())) == (2, 1)
    assert list(tmp_path.iterdir()) == []
