"""Evaluation in inference mode before training, each in a fresh process: nothing kept may belong to the first alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kw_lightning.nn.engine import ENGINES
from kw_lightning.nn.engine.workspace import scratch


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_trainer_fits_after_validating_and_every_engine_trains_after_an_evaluation(switch: str) -> None:
    script = Path(__file__).with_name("inference_script.py")
    done = subprocess.run(
        [sys.executable, str(script), *ENGINES],
        env={**os.environ, "KW_NATIVE": switch, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_memory_made_in_inference_mode_is_no_inference_tensor() -> None:
    with torch.inference_mode():
        made = scratch("a purpose of this test's own", [3], torch.empty(1))
    assert not made.is_inference()
    made.zero_()
