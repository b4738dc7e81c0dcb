"""A recipe that leaves the number of classes to its data: kw-fit, kw plan and kw check."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import kw_lightning
from kw_lightning import load_recipe
from kw_lightning.cli import application
from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.classes import resolved

RECIPE = """
kw: 1
model:
  input: [3, 8, 8]
  layers: [Flatten, {Dense: {units: auto}}]
data: {name: image_folder, root: DATA, batch_size: 4, train: {size: 8}}
train: {epochs: 1, accelerator: cpu}
log: {tensorboard: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for label in ("cat", "dog", "eel"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), "red").save(tmp_path / "pets" / label / f"{number}.png")
    file = tmp_path / "pets.yaml"
    file.write_text(RECIPE.replace("DATA", str(tmp_path / "pets")))
    return file


def test_the_lock_of_a_run_has_the_number(recipe: Path, tmp_path: Path) -> None:
    result = fit(recipe, output=tmp_path / "run")
    locked = load_recipe(tmp_path / "run/recipe.lock.yaml")
    assert locked.model is not None
    assert locked.model.layers[1] == {"Dense": {"units": 3}}
    assert tuple(kw_lightning.load(result.folder).classes) == ("cat", "dog", "eel")
    fit(recipe, ["train.epochs=2"], output=tmp_path / "run", resume="auto")  # the same network goes on


def test_plan_looks_at_the_data_and_says_where_it_is_not(recipe: Path) -> None:
    run = CliRunner().invoke
    here = run(application(), ["plan", str(recipe), "--json"])
    assert json.loads(here.stdout)["parameters"]["static"] == 3 * (8 * 8 * 3 + 1)
    gone = run(application(), ["plan", str(recipe), "data.root=/nowhere", "--json"])
    assert gone.exit_code == 0
    assert json.loads(gone.stdout)["parameters"]["static"] == 1000 * (8 * 8 * 3 + 1)
    assert "model.layers[1].Dense.units is auto" in gone.stderr
    assert "planned with 1,000 classes. data: /nowhere" in gone.stderr
    assert run(application(), ["check", str(recipe)]).exit_code == 0


def test_without_data_that_says_it_the_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"backbone": "torchvision/resnet18", "args": {"num_classes": "auto"}}
    with pytest.raises(RecipeError, match=r"model\.args\.num_classes: auto .* names no data; give a number"):
        resolved(load_recipe({"kw": 1, "model": model}))
    with pytest.raises(RecipeError, match=r"model\.args\.num_classes: auto .*has to be a number"):
        kw_lightning.build(load_recipe({"kw": 1, "model": model}))
    (tmp_path / "own_data.py").write_text("from lightning.pytorch import LightningDataModule as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = load_recipe({"kw": 1, "model": model, "data": {"name": "python:own_data:Mine"}})
    with pytest.raises(RecipeError, match=r"the attribute num_classes of .*does not have; give a number"):
        resolved(own, allow_python=["own_data"])
