"""Fashion-MNIST, 60,000 + 10,000 real images, trained for an epoch with a validation part.

Debian's package `dataset-fashion-mnist` holds the files; `pytest -s -m slow tests/fit/test_fashion_mnist.py` takes a
minute or two and prints the accuracy.
"""

import gzip
import json
from pathlib import Path

import pytest

from kw_lightning.fit import evaluate, fit

FILES = Path("/usr/share/datasets/fashion-mnist")
RECIPE = {
    "kw": 1,
    "name": "fashion",
    "model": {
        "input": [1, 28, 28],
        "layers": [
            {"Conv2D": {"filters": 16, "kernel_size": 3, "strides": 2, "padding": "same"}},
            "BatchNormalization",
            "ReLU",
            {"Conv2D": {"filters": 32, "kernel_size": 3, "strides": 2, "padding": "same", "warehouse": "body"}},
            "BatchNormalization",
            "ReLU",
            {"Conv2D": {"filters": 32, "kernel_size": 3, "padding": "same", "warehouse": "body"}},
            "BatchNormalization",
            "ReLU",
            "Flatten",
            {"Dense": {"units": "auto"}},
        ],
    },
    "warehouses": {"body": {}},
    "defaults": {"cell": {"out": 1, "in": 1}, "attention": {"at_most": 2}},
    "temperature": {"epochs": 0.5},
    "data": {
        "name": "fashion_mnist",
        "validation": 0.1,
        "batch_size": 128,
        "train": {"mean": [0.286], "std": [0.353]},
    },
    "train": {"epochs": 1, "optimizer": {"lr": 2.0e-3}, "accelerator": "cpu"},
    "log": {"tensorboard": False},
}


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_an_epoch_of_fashion_mnist_chooses_on_validation_and_tests_once(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in FILES.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    data = {**RECIPE["data"], "root": str(tmp_path)}  # type: ignore[dict-item]
    result = fit({**RECIPE, "data": data}, output=tmp_path / "run")
    validated = json.loads((tmp_path / "run/split.json").read_text())["validation"]
    assert (len(validated), len(set(validated))) == (6_000, 6_000)
    print(f"validation {result.best['accuracy']:.2%}, test {result.test['accuracy']:.2%}")
    assert result.test["accuracy"] > 0.8
    assert evaluate(tmp_path / "run", split="test").metrics == result.test
    assert abs(result.best["accuracy"] - result.test["accuracy"]) < 0.03
