"""What a run shows of itself, on a terminal of 80 columns and elsewhere; the terminal is a real one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kw_lightning.fit.report import metrics_table

QUICK = ["train.epochs=2", "temperature.epochs=1", "data.train.samples=64", "data.eval.samples=40", "log.report=false"]


def on_terminal(folder: Path, term: str) -> list[str]:
    """Return the lines that a run leaves on a terminal, without colours and movements of the cursor."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "80", "LINES": "50"}
    program = "from kw_lightning.cli import fit_main; fit_main()"
    command = [sys.executable, "-c", program, "digits-resnet", *QUICK, "log.tensorboard=false", "--output", str(folder)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_has_a_line_of_history_an_epoch(tmp_path: Path, term: str) -> None:
    lines = on_terminal(tmp_path / "run", term)
    history = [line for line in lines if line.startswith("epoch ")]
    pattern = r"epoch {}/2  train/loss \d\.\d{{4}}  val/accuracy \d\.\d{{4}}  val/loss \d\.\d{{4}}  val/top5 .* s"
    assert [bool(re.fullmatch(pattern.format(n), line.strip())) for n, line in enumerate(history, 1)] == [True, True]
    text = "\n".join(lines)
    assert "v_num" not in text
    assert "Epoch 0" not in text
    assert ("Epoch 1/2" in text) == (term == "xterm")
    bars = [line for line in lines if "Epoch 2/2" in line]
    assert all("/4" in bar or "/1" in bar or ":" in bar for bar in bars)


def test_the_best_five_of_five_classes_are_not_shown() -> None:
    few, many = {"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "top5": 0.9, "loss": 1.0}
    assert metrics_table({"last": many, "best": many}).row_count == 3
    assert metrics_table({"last": few, "best": few}).row_count == 2
