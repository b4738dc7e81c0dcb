"""What 0.1.0 wrote is read for ever: its recipe, its run folder and its checkpoints, to the same numbers.

The files were made by 0.1.0 and are never made anew. Each later version whose files differ gets a folder of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import kw_lightning
from kw_lightning.callbacks import load_from_checkpoint
from kw_lightning.fit import evaluate, fit
from kw_lightning.recipe import load_recipe

KEPT = Path(__file__).parent / "data"
VERSIONS = sorted(path for path in KEPT.iterdir() if path.name[0].isdigit())
IMAGES = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)


class Small(LightningModule):
    """The module whose checkpoint `callback.ckpt` is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).mean(dim=(2, 3))


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def found(kept: Path) -> dict[str, Any]:
    """Return what the version that wrote the files made of them."""
    numbers: dict[str, Any] = json.loads((kept / "found.json").read_text())
    return numbers


def test_a_recipe_plans_the_same_network(kept: Path) -> None:
    for recipe in (kept / "recipe.yaml", kept / "run/recipe.lock.yaml"):
        parameters = kw_lightning.plan(load_recipe(recipe)).parameters
        assert {"static": parameters.static, "kw": parameters.kw} == found(kept)["parameters"]


def test_a_run_gives_the_same_metrics(kept: Path) -> None:
    assert evaluate(kept / "run").metrics == pytest.approx(found(kept)["metrics"], abs=1e-5)


def test_a_saved_network_answers_the_same(kept: Path) -> None:
    with torch.no_grad():
        logits = kw_lightning.load(kept / "run/model").network(IMAGES)
    torch.testing.assert_close(logits, torch.tensor(found(kept)["logits"]), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_with_the_callback_answers_the_same(kept: Path) -> None:
    model = load_from_checkpoint(Small, kept / "callback.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), torch.tensor(found(kept)["callback"]), atol=1e-5, rtol=1e-4)


def test_a_run_goes_on(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "run", tmp_path / "run")
    before = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    fit(kept / "recipe.yaml", ["train.epochs=3"], resume=tmp_path / "run")
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert after == before // 2 * 3
