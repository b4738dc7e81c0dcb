"""Data sets of Hugging Face's `datasets`, here ones that are made on disk."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Picture

import kw_lightning
from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit import evaluate, fit
from kw_lightning.fit.data import ImageData, data_module

datasets = pytest.importorskip("datasets")


def rows(labels: list[Any], names: list[str] | None = None) -> Any:
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    pictures = [Picture.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "animal": kind})
    return datasets.Dataset.from_dict({"picture": pictures, "animal": labels}, features=features)


def recipe(folder: Path, **args: str) -> Any:
    return load_recipe(
        {
            "kw": 1,
            "model": {"input": [3, 8, 8], "layers": [{"Flatten": {}}, {"Dense": {"units": "auto"}}]},
            "data": {"name": f"hf/{folder}", "batch_size": 4, "train": {"size": 8}, **({"args": args} if args else {})},
            "train": {"epochs": 1, "accelerator": "cpu"},
            "log": {"tensorboard": False, "report": False},
        }
    )


def test_a_data_set_on_disk_trains(tmp_path: Path) -> None:
    parts = {part: rows([0, 1] * n, ["cat", "dog"]) for part, n in (("train", 4), ("validation", 1), ("test", 2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "pets")
    data = data_module(recipe(tmp_path / "pets"))
    assert isinstance(data, ImageData)
    assert (data.classes, len(data.parts["train"]), len(data.parts["val"])) == (("cat", "dog"), 8, 2)
    image, target = data.parts["train"].samples[3]
    assert (image.getpixel((0, 0)), target) == ((3, 0, 0), 1)
    result = fit(recipe(tmp_path / "pets"), output=tmp_path / "run")
    assert evaluate(result.folder).metrics == result.test
    assert tuple(kw_lightning.load(result.folder).classes) == ("cat", "dog")


def test_without_splits_some_of_every_class_is_held_out(tmp_path: Path) -> None:
    rows(["eel"] * 4 + ["ant"] * 4).save_to_disk(tmp_path / "pets")
    data = data_module(recipe(tmp_path / "pets", label="animal"))
    assert isinstance(data, ImageData)
    assert (data.classes, len(data.parts["train"]), len(data.parts["val"])) == (("ant", "eel"), 6, 2)
    assert sorted(target for _, target in data.parts["val"]) == [0, 1]  # type: ignore[attr-defined]
    assert "2 of the 8 training images validate" in data.notes[0]


def test_a_column_of_lists_gives_an_image_several_labels(tmp_path: Path) -> None:
    labels = [[0, 1], [], [1], [0]] * 3
    pictures = [Picture.new("RGB", (8, 8), (number, 0, 0)) for number in range(12)]
    kind = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))
    features = datasets.Features({"picture": datasets.Image(), "animals": kind})
    table = datasets.Dataset.from_dict({"picture": pictures, "animals": labels}, features=features)
    table.save_to_disk(tmp_path / "pets")
    found = recipe(tmp_path / "pets")
    several = load_recipe({**found.document.data, "data": {**found.document.data["data"], "labels": "several"}})
    data = data_module(several)
    assert isinstance(data, ImageData)
    assert data.classes == ("cat", "dog")
    assert data.parts["train"].samples[0][1].tolist() == [1, 1]
    assert set(fit(several, output=tmp_path / "run").last) == {"map", "f1", "exact", "loss"}
    with pytest.raises(RunError, match=r"animals has several to a row, and data\.labels is one$"):
        data_module(recipe(tmp_path / "pets", label="animals"))
    rows([0, 1], ["cat", "dog"]).save_to_disk(tmp_path / "single")
    single = {**several.document.data["data"], "name": f"hf/{tmp_path / 'single'}", "args": {"label": "animal"}}
    with pytest.raises(RunError, match=r"animal has one to a row, and data\.labels is several$"):
        data_module(load_recipe({**several.document.data, "data": single}))


def test_mistakes_say_what_is_there(tmp_path: Path) -> None:
    rows(["eel"] * 4).save_to_disk(tmp_path / "pets")
    with pytest.raises(RunError, match=r"which column is the label\? Say it by data\.args\.label: picture, animal"):
        data_module(recipe(tmp_path / "pets"))
    with pytest.raises(RunError, match=r'the unknown column "animl".*did you mean "animal"\?'):
        data_module(recipe(tmp_path / "pets", label="animl"))
    with pytest.raises(RunError, match=r'the unknown split "dev", allowed: train'):
        data_module(recipe(tmp_path / "pets", label="animal", evaluation="dev"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty cannot be read: "):
        data_module(recipe(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="unknown key"):
        recipe(tmp_path / "pets", colum="x")
