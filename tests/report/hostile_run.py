"""A recipe and pictures for it, in a second of training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image

SCRIPT = "<script>document.title='owned'</script>"
CLASSES = {SCRIPT: (200, 40, 40), "$x^2 & _{": (40, 200, 40), "猫\n\x1b[31m": (40, 40, 200)}
"""Markup, matplotlib's mathematics, and a script without a glyph with what moves a terminal's cursor."""
RECIPE: dict[str, Any] = {
    "kw": 1,
    "name": "pets",
    "description": "<img src=x onerror=\"document.title='owned'\">",
    "model": {
        "input": [3, 8, 8],
        "layers": [
            {"Conv2D": {"name": "first", "filters": 8, "kernel_size": 3, "padding": "same", "warehouse": "shelf"}},
            "ReLU",
            {"Conv2D": {"name": "second", "filters": 8, "kernel_size": 3, "padding": "same", "warehouse": "shelf"}},
            "GlobalAveragePooling2D",
            {"Dense": {"units": "auto"}},
        ],
    },
    "data": {"name": "csv", "batch_size": 8, "train": {"size": 8, "flip": True}, "eval": {"size": 8}},
    "train": {"epochs": 2, "accelerator": "cpu", "optimizer": {"lr": 0.05}, "mixup": 0.1},
    "warehouses": {"shelf": {"cell": {"out": "1/2", "in": 1, "spatial": "whole"}}},
    "temperature": {"epochs": 1},
    "log": {"every_n_steps": 1},
}


def write_pictures(folder: Path, each: int = 12) -> Path:
    """Write pictures of each class and return the table of them."""
    table = folder / "pictures.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, (label, colour) in enumerate(CLASSES.items()):
            for k in range(each):
                name = f"{number}-{k}.png"
                Image.new("RGB", (8, 8), tuple(min(value + 3 * k, 255) for value in colour)).save(folder / name)
                rows.writerow([name, label, ("train", "train", "val", "test")[k % 4]])
    return table
