"""The softmax's own temperature: annealed by the temperature's callback, exact on resume, in averages too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from kw_lightning import convert
from kw_lightning.callbacks import KWCallback, load_from_checkpoint
from kw_lightning.nn import warehouses


def recipe(**annealings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose warehouses have a softmax, those named here with an annealing."""
    data = copy.deepcopy(RECIPE)
    for name, entry in data["warehouses"].items():
        entry["attention"]["function"] = "softmax"
        if name in annealings:
            entry["attention"]["softmax_temperature"] = annealings[name]
    return data


class Recorder(Callback):
    """Notes T of the convolutions with which each batch is computed."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        softmax = warehouses(pl_module)["convolutions"].softmax_temperature
        assert softmax is not None
        self.found.append(float(softmax))


def fit(folder: Path, data: dict[str, Any], callbacks: tuple[Callback, ...] = (), **options: Any) -> list[float]:
    recorder = Recorder()
    run = trainer(
        folder,
        max_epochs=2,
        callbacks=[KWCallback(data), recorder, *callbacks],
        enable_checkpointing=True,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
    )
    run.fit(Classifier(), loader(), **options)
    return recorder.found


def test_it_falls_linearly_is_logged_and_resumes_at_the_exact_value(tmp_path: Path) -> None:
    data = recipe(convolutions={"start": 30, "end": 1, "epochs": 1.2})
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = fit(tmp_path / "whole", data, (checkpoint,))
    assert whole == pytest.approx([1 + 29 * max(0, (6 - t) / 6) for t in range(1, 11)], rel=1e-6)
    rest = fit(tmp_path / "rest", data, ckpt_path=tmp_path / "step=4.ckpt")
    assert rest == whole[4:]
    (metrics,) = (tmp_path / "whole").rglob("metrics.csv")
    assert "softmax_temperature" in metrics.read_text().partition("\n")[0].split(",")
    module = load_from_checkpoint(Classifier, tmp_path / "step=4.ckpt")
    found = warehouses(module)
    assert found["head"].softmax_temperature is None
    assert float(found["convolutions"].softmax_temperature) == pytest.approx(whole[3])  # type: ignore[arg-type]


def test_averages_have_it_too_and_unequal_annealings_are_logged_by_name(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.9)
    data = recipe(convolutions={"epochs": 1}, head={"start": 10, "epochs": 2})
    fit(tmp_path, data, (average,))
    assert average._average_model is not None
    (metrics,) = tmp_path.rglob("metrics.csv")
    titles = metrics.read_text().partition("\n")[0].split(",")
    assert {"softmax_temperature/convolutions", "softmax_temperature/head"} <= set(titles)
    for warehouse in warehouses(average._average_model).values():
        assert float(warehouse.softmax_temperature) == 1.0  # type: ignore[arg-type]


def test_half_precision_leaves_it_its_digits() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3))
    attention = {"function": "softmax", "softmax_temperature": {"start": 30.1}}
    convert(network, {"kw": 1, "warehouses": {"a": {"layers": ["0"], "attention": attention}}})
    warehouse = warehouses(network.to(torch.bfloat16))["a"]
    assert float(warehouse.softmax_temperature) == pytest.approx(30.1, abs=1e-5)  # type: ignore[arg-type]
    assert network(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).isfinite().all()
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="the softmax's temperature"):
            warehouse.set_softmax_temperature(wrong)
