"""The diffs of CONTRIBUTING apply to the package as it stands and do what they say; a clone stays small."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CHECK = """
import torch
from kw_lightning import build, load_recipe, plan
from kw_lightning.fit.data.sets import DATA_SETS
from kw_lightning.nn.engine import computing, reference
from kw_lightning.nn.engine.paths import find_path

network = {"input": [1, 8, 8], "layers": [{"Flatten": {}}, {"AlphaDropout": {"rate": 0.1}}, {"Dense": {"units": 10}}]}
recipe = load_recipe(
    {
        "kw": 1,
        "model": network,
        "data": {"name": "kmnist", "args": {"download": True}},
        "train": {"early_stop": {"reached": 0.99}},
    }
)
assert "kmnist" in DATA_SETS
assert recipe.train.early_stop.reached == 0.99
assert any(isinstance(module, torch.nn.AlphaDropout) for module in build(recipe).modules())
assert plan(load_recipe("resnet34-kw-1x")).parameters.static == 21_797_672
layer = build(load_recipe("resnet18-kw-1x")).layer1[0].conv1
convolution, cells = layer._convolution(), layer.warehouse.cells.detach()
x, attention = torch.randn(2, 64, 7, 7), torch.randn(2, layer.attention.mixtures, len(cells))
found = computing.forward(x, attention, cells, convolution, find_path("mix_kernels/unfolded"))
torch.testing.assert_close(found, reference.convolve(x, attention, cells, convolution), atol=1e-3, rtol=1e-3)
"""


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the package with all diffs applied."""
    if shutil.which("git") is None:
        pytest.skip("git applies the diffs")
    for folder in ("kw_lightning", "recipes", "schemas", "tests/keras"):
        ignored = shutil.ignore_patterns("__pycache__", "runs", "*.npz")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for diff in DIFFS:
        applied = subprocess.run(
            ["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert applied.returncode == 0, applied.stderr
    return tmp_path


def test_a_clone_holds_no_large_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a clone")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.stdout.split("\0") if (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 2**20} == {}


def test_every_diff_applies(changed: Path) -> None:
    assert len(DIFFS) == 5
    for diff in DIFFS:
        for name in re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE):
            before = (ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else ""
            assert (changed / name).read_text(encoding="utf-8") != before


@pytest.mark.slow
def test_what_is_added_works(changed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(changed)}
    ended = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=changed, env=environment, capture_output=True, text=True, timeout=250
    )
    assert ended.returncode == 0, ended.stderr
