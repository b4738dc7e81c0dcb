"""`kw-fit` and `kw evaluate` as a user runs them, in processes of their own."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.cli.arguments import recipe_and_overrides

QUICK = [
    "vars.stem=16",
    "vars.first=16",
    "vars.second=16",
    "data.train.samples=40",
    "data.eval.samples=20",
    "temperature.epochs=1",
    "log.report=false",
]


def command(name: str, *arguments: str) -> list[str]:
    entry = {"kw": "main", "kw-fit": "fit_main"}[name]
    return [sys.executable, "-c", f"from kw_lightning.cli import {entry}; {entry}()", *arguments]


def run(
    folder: Path, name: str, *arguments: str, limit: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=limit,
    )


def test_help_and_check_need_no_torch() -> None:
    script = "import sys; from kw_lightning.cli import application; application(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_version_is_printed() -> None:
    result = CliRunner().invoke(application(), ["--version"])
    assert (result.exit_code, result.output.split()[0]) == (0, "kw-lightning")


def test_arguments_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_and_overrides(["train.epochs=5", "net.yaml", "a.b[0]=1=2"]) == (
        "net.yaml",
        ["train.epochs=5", "a.b[0]=1=2"],
    )
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").touch()
    assert recipe_and_overrides(["lr=1.yaml"]) == ("lr=1.yaml", [])


@pytest.mark.parametrize("arguments", [["train.epochs=5"], ["one.yaml", "two.yaml"]])
def test_one_recipe_is_needed(arguments: list[str]) -> None:
    result = CliRunner().invoke(application(), ["fit", *arguments])
    assert result.exit_code == 2
    assert "one recipe is needed" in result.output


def test_mistakes_are_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text("kw: 1\nextends: digits-resnet\ntrain:\n  epoch: 3\ndata: {batchsize: 2}\n")
    result = run(tmp_path, "kw-fit", "net.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith('net.yaml:4:3: train.epoch: found the unknown key "epoch"')
    assert 'did you mean "epochs"?' in first
    assert second.startswith("net.yaml:5:8: data.batchsize")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, "kw-fit", "digits-resnet", "--dry-run", "defaults.budget=1/2")
    assert result.returncode == 0, result.stderr
    assert "stage2" in result.stdout
    assert "54,594" in result.stdout  # parameters
    assert list(tmp_path.iterdir()) == []


def test_fit_then_evaluate(tmp_path: Path) -> None:
    result = run(tmp_path, "kw-fit", "train.epochs=1", "digits-resnet", *QUICK, "--output", "out")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("digits-resnet")
    assert any(line.startswith("epoch 1/1") for line in lines)
    assert any("top-1 accuracy" in line for line in lines)
    assert lines[-1] == "run folder: out"
    found = run(tmp_path, "kw", "evaluate", "out", "--json")
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout)
    wanted = json.loads((tmp_path / "out/result.json").read_text())["test"]["best"]
    assert {key: measured[key] for key in wanted} == wanted
    assert (measured["split"], measured["epoch"]) == ("test", 1)
    refused = run(tmp_path, "kw", "evaluate", "nothing")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "nothing: no such file or folder; a run folder or a checkpoint file is needed\n"


def test_ctrl_c_ends_with_130_and_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("kw-fit", "digits-resnet", *QUICK, "train.epochs=1000", "--output", "out"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        r"Interrupted after step \d+; its state is in out/checkpoints/last\.ckpt: go on with --resume out\n", errors
    )
    assert json.loads(run(tmp_path, "kw", "evaluate", "out/checkpoints/last.ckpt", "--json").stdout)["epoch"] >= 2


def test_full_disk_is_one_message(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    started = time.monotonic()
    result = run(tmp_path, "kw-fit", "digits-resnet", *QUICK, "--output", "out", limit=small_files)
    assert time.monotonic() - started < 150
    assert (result.returncode, result.stderr) == (1, "out: the disk is full, or a quota is reached\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run(tmp_path, "kw-fit", "digits-resnet", *QUICK)
    assert (result.returncode, result.stderr) == (1, "runs: Permission denied\n")
