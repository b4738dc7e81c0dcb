"""The examples under recipes/examples, run as their users run them."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kw_lightning
from kw_lightning.callbacks.layout import layout
from kw_lightning.recipe.sources import names

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "recipes" / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    """Run a script in this process, from the root of the checkout as the README says."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def accuracy(text: str) -> float:
    return float(re.findall(r"accuracy (\d\.\d+)", text)[-1])


def test_the_example_of_an_own_module_learns_and_writes_its_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "own_module.py", "--epochs", 3, "--folder", tmp_path)
    assert accuracy(capsys.readouterr().out) > 0.5  # chance is 0.1
    (last,) = sorted(tmp_path.rglob("*.npz"))[-1:]
    assert set(np.load(last)) == {"high", "high/layers", "low", "low/layers"}
    (entry,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["kw_lightning"]
    assert list(entry["layout"]["low"]["layers"]) == ["net.conv3", "net.conv4"]


def test_the_example_of_lightning_cli_anneals_and_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")  # LightningCLI's own extra
    options = ["--trainer.max_epochs", 1, "--trainer.default_root_dir", tmp_path]
    run(monkeypatch, "lightning_cli.py", "fit", "--config", "recipes/examples/lightning_cli.yaml", *options)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "net.conv1.warehouse.cells" in weights
    assert float(weights["net.conv1.warehouse.temperature"]) == pytest.approx(0.5)  # one of two epochs


def test_the_example_of_fabric_learns_and_anneals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "fabric.py", "--epochs", 4, "--folder", tmp_path)
    text = capsys.readouterr().out
    assert accuracy(text) > 0.5  # chance is 0.1
    assert "'high'" in text
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["model"]
    assert float(weights["conv1.warehouse.temperature"]) == 0.0


def test_fsdp2_on_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    script = [str(EXAMPLES / "fsdp2.py"), "--devices=2", "--accelerator=cpu", "--epochs=1", f"--folder={tmp_path}"]
    done = subprocess.run(
        [*launch, *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert 0 < accuracy(done.stdout) < 1
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    monolith = runpy.run_path(str(EXAMPLES / "own_module.py"))["Digits"]()
    kw_lightning.convert(monolith, EXAMPLES / "digits.yaml")
    monolith.load_state_dict(weights)  # one whole file, which a network without sharding reads
    assert set(layout(monolith)) == {"high", "low"}


def test_examples_are_no_shipped_recipes() -> None:
    assert not [name for name, source in names().items() if "examples" in source.name]
    assert "digits-resnet" in names()
