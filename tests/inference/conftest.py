"""A small network with random weights, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kw_lightning.builder import build
from kw_lightning.inference import ImageClassifier, SavedNetwork
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe

CLASSES = tuple(f"class {number}" for number in range(10))


@pytest.fixture(scope="session")
def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    recipe = load_recipe(
        {
            "kw": 1,
            "name": "small",
            "model": {
                "input": [3, 16, 16],
                "layers": [
                    {"Conv2D": {"filters": 8, "kernel_size": 3, "warehouse": "stage"}},
                    {"BatchNormalization": {}},
                    {"ReLU": {}},
                    {"Conv2D": {"filters": 8, "kernel_size": 3, "warehouse": "stage"}},
                    {"GlobalAveragePooling2D": {}},
                    {"Dense": {"units": 10}},
                ],
            },
            "warehouses": {"stage": {"budget": 2}},
        }
    )
    network = build(recipe)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    steps = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 16, 18, "center", "bilinear", "a test", channels=3)
    return ImageClassifier(SavedNetwork(network.eval(), recipe, steps, CLASSES))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of 7 pictures of several sizes and kinds."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, side in enumerate((20, 24, 31, 20, 40, 18)):
        pixels = random.integers(0, 256, (side, side + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(random.integers(0, 256, (22, 22), dtype=np.uint8)).save(folder / "below" / "grey.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder
