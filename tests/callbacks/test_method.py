"""One language: KWCallback and kw-fit make the same callbacks of a recipe, and write the same entry."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, loader, trainer

from kw_lightning import load_recipe
from kw_lightning.callbacks import KWCallback, load_from_checkpoint
from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.callbacks.layout import misfits
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.trainer import make_callbacks

SECTIONS = {
    "temperature": {"start": 0.9, "end": 0.1, "epochs": 2.5, "shape": "cosine"},
    "log": {"attention": {"every_n_epochs": 3, "figures": True}},
}


def settings(callback: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(callback).items() if name not in ("module", "folder", "_listening")}


def test_both_ways_to_train_make_the_same_callbacks(tmp_path: Path) -> None:
    recipe = {**RECIPE, **SECTIONS}
    ours = KWCallback(recipe)
    theirs = {type(callback): callback for callback in make_callbacks(load_recipe(recipe), RunFolder(tmp_path))}
    assert ours.attention is not None
    for callback in (ours.temperature, ours.attention):
        assert settings(callback) == settings(theirs[type(callback)])
    assert (ours.temperature.start, ours.temperature.epochs, ours.attention.every_n_epochs) == (0.9, 2.5, 3)


def test_a_recipe_with_a_dollar_sign_comes_back_out_of_a_checkpoint(tmp_path: Path) -> None:
    model = Classifier()
    run = trainer(tmp_path, callbacks=[KWCallback({**RECIPE, "description": "costs $${money}"})])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded.net.head.warehouse.cells, model.net.head.warehouse.cells)
    (entry,) = torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]
    assert load_recipe(entry["recipe"]).description == "costs ${money}"


def test_misfits_are_told_with_the_dynamic_layers_first() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    weights = {**network.state_dict(), "0.bias": torch.zeros(4), "more": torch.zeros(1)}
    del weights["1.bias"]
    assert misfits(network, network.state_dict()) == []
    assert misfits(network, weights) == [
        '"0.bias" is [4] in the weights and [3] here',
        '"1.bias" is missing in the weights',
        '"more" is in the weights and not here',
    ]


def test_kw_fit_writes_the_entry_of_the_callback_and_plans_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planning = importlib.import_module("kw_lightning.planning.plan")  # the package has a function of this name
    from kw_lightning.fit import Classifier as Trained
    from kw_lightning.fit import fit

    made = []
    original = planning._plan
    monkeypatch.setattr(planning, "_plan", lambda *given: made.append(given) or original(*given))
    small = ["vars.stem=16", "vars.first=16", "vars.second=16", "data.train.samples=20", "data.eval.samples=20"]
    recipe = load_recipe("digits-resnet", [*small, "data.batch_size=20", "train.epochs=1", "log.tensorboard=false"])
    planned = planning.plan(recipe)
    result = fit(planned, output=tmp_path / "run")
    assert result.module.plan is planned
    assert len(made) == 1
    checkpoint = result.folder / "checkpoints/last.ckpt"
    (entry,) = torch.load(checkpoint, weights_only=True)[KEY]
    assert entry["module"] == "network"
    assert set(entry["layout"]) == {warehouse.name for warehouse in planned.warehouses}
    with pytest.warns(UserWarning, match="ignored the sections"):
        loaded = load_from_checkpoint(Trained, checkpoint, weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in result.module.state_dict().items())
