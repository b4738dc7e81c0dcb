"""Which images train, which validate and which test: drawn once, kept with the run, and said with every figure."""

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit import evaluate, fit
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.data.sets import targets_of
from kw_lightning.fit.data.splitting import SPLIT, Split, draw
from kw_lightning.fit.evaluation import parts_of

SMALL = {"input": [3, 8, 8], "layers": [{"Flatten": {}}, {"Dense": {"units": "auto"}}]}
TRAIN = {"epochs": 1, "accelerator": "cpu", "optimizer": {"name": "SGD", "lr": 0.01}}


def pictures(root: Path, **counts: int) -> Path:
    for number, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (60 * number, 5 * index, 99)).save(root / label / f"{index}.png")
    return root


def recipe_of(root: Path, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    own = {"name": "image_folder", "root": str(root), "batch_size": 4, "train": {"size": 8}, **(data or {})}
    return {"kw": 1, "name": "pets", "model": SMALL, "data": own, "train": {**TRAIN, **train}, "log": {"report": False}}


def test_the_share_of_every_class_is_drawn_and_never_all_of_it() -> None:
    targets = [0] * 30 + [1] * 10 + [2] * 2 + [3]
    for share, counts in ((Fraction(1, 10), [3, 1, 1, 0]), (Fraction(99, 100), [29, 9, 1, 0])):
        split = draw(range(len(targets)), targets, share, seed=0)
        train, validation = split.places(range(len(targets)))
        assert sorted([*train, *validation]) == list(range(43))
        assert torch.bincount(torch.tensor(targets)[validation], minlength=4).tolist() == counts
        assert split.alone == (3,)
    assert draw(range(43), targets, Fraction(1, 10), seed=0) == draw(range(43), targets, Fraction(1, 10), seed=0)
    assert draw(range(43), targets, Fraction(1, 10), seed=0) != draw(range(43), targets, Fraction(1, 10), seed=1)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, "1/1", "0/3", "7/6", "half", True])
def test_a_share_that_is_none_is_a_placed_mistake(share: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.validation: found .*over 0 and under 1"):
        load_recipe(recipe_of(tmp_path, {"validation": share}))


def test_every_data_set_without_a_validation_part_gets_one_from_training() -> None:
    digits = ImageData(load_recipe("digits-resnet"))
    assert [(part, len(images)) for part, images in digits.parts.items()] == [
        ("train", 1000),
        ("test", 597),
        ("val", 200),
    ]
    assert torch.bincount(targets_of(digits.parts["val"].samples)).tolist() == [20] * 10
    assert digits.notes == ()  # the recipe asks for it
    other = ImageData(load_recipe("digits-resnet", ["train.seed=1"]))
    assert other.split != digits.split
    whole = ImageData(load_recipe("digits-resnet", ["data.validation=none"]))
    assert (len(whole.parts["train"]), parts_of(whole)) == (1200, ("train", "test"))
    assert "no checkpoint is chosen" in whole.notes[0]
    own = ["data.name=fake", "data.args={shape: [1, 8, 8], train: 40, evaluation: 20}"]
    fake = ImageData(load_recipe("digits-resnet", own))
    assert (fake.split, len(fake.parts["train"]), len(fake.parts["val"])) == (None, 40, 20)
    assert "a validation part of its own" in fake.notes[0]


def test_evaluation_and_resume_use_the_very_images_that_validated(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets", cat=12, dog=12, eel=1)
    result = fit(recipe_of(root, {"validation": "1/4"}, epochs=2), output=tmp_path / "run")
    written = json.loads((tmp_path / "run/split.json").read_text())
    assert len(written["validation"]) == 6
    assert (written["seed"], written["share"]) == (0, "1/4")
    for number in range(12, 30):  # images that came later do not change which ones validate
        Image.new("RGB", (8, 8), (0, 0, 200)).save(root / "cat" / f"{number}.png")
    fresh = ImageData(load_recipe(tmp_path / "run/recipe.lock.yaml"))
    assert fresh.split is not None
    assert list(fresh.split.validation) != written["validation"]
    assert evaluate(tmp_path / "run", split="val").metrics == result.best
    (root / "train").mkdir()
    for label in ("cat", "dog", "eel"):
        (root / label).rename(root / "train" / label)
    assert evaluate(tmp_path / "run", [f"data.root={root / 'train'}"], split="val").metrics == result.best
    resumed = fit(
        recipe_of(root / "train", {"validation": "1/4"}, epochs=3),
        output=tmp_path / "run",
        resume=tmp_path / "run",
    )
    state = torch.load(resumed.folder / "checkpoints/last.ckpt", weights_only=True)
    assert state[SPLIT] == written == json.loads((tmp_path / "run/split.json").read_text())


def test_a_part_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pets", cat=3, dog=3)
    result = fit(recipe_of(root), output=tmp_path / "run")
    assert (result.test, evaluate(result.folder).split) == ({}, "val")
    assert "test" not in json.loads((tmp_path / "run/result.json").read_text())
    assert evaluate(result.folder, split="train").metrics["loss"] > 0
    with pytest.raises(RunError, match='the data has no test part: found split="test", allowed: train, val'):
        evaluate(result.folder, split="test")
    with pytest.raises(RunError, match='the unknown split "valid", allowed: train, val, test; did you mean "val"'):
        evaluate(result.folder, split="valid")
    elsewhere = pictures(tmp_path / "others", cat=2)
    (elsewhere / "cat" / "0.png").rename(elsewhere / "cat" / "new0.png")
    (elsewhere / "cat" / "1.png").rename(elsewhere / "cat" / "new1.png")
    with pytest.raises(RunError, match='neither a test nor a validation part; split="train"'):
        evaluate(result.folder, [f"data.root={elsewhere}"])


def test_without_validation_the_last_checkpoint_is_the_chosen_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = pictures(tmp_path / "pets", cat=1, dog=1)
    with caplog.at_level(logging.WARNING):
        result = fit(recipe_of(root), output=tmp_path / "run")
    assert [record.message.removeprefix(f"data: {root}: ") for record in caplog.records] == [
        "of a class with a single image none validates: cat, dog",
        "neither a validation nor a test part: the last checkpoint is the one that is used, and nothing is measured",
    ]
    assert (result.last, result.best, result.test) == ({}, {}, {})
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]
    assert json.loads((tmp_path / "run/result.json").read_text())["checkpoint"] == "last.ckpt"
    assert "Nothing was measured" in (tmp_path / "run/model/README.md").read_text()


def test_the_test_part_stays_closed_until_it_is_asked_for(tmp_path: Path) -> None:
    for part, count in (("train", 8), ("test", 4)):
        pictures(tmp_path / "data" / part, cat=count, dog=count)
    recipe = recipe_of(tmp_path / "data", {"test": False})
    closed = fit(recipe, output=tmp_path / "run")
    written = json.loads((tmp_path / "run/result.json").read_text())
    assert (closed.test, "test" in written, "val" in written) == ({}, False, True)
    opened = fit(recipe, ["data.test=true"], output=tmp_path / "run", resume="auto")
    assert opened.test == evaluate(tmp_path / "run", split="test").metrics


def test_the_card_names_the_part_of_each_figure(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for part in ("train", "val", "test"):
        pictures(root / part, cat=4, dog=4)
    result = fit(recipe_of(root), output=tmp_path / "run")
    card = (tmp_path / "run/model/README.md").read_text()
    for part, metrics in (("val", result.best), ("test", result.test)):
        assert f"| {part} | accuracy | {metrics['accuracy']:.4f} |" in card
    assert not (tmp_path / "run/split.json").exists()  # nothing was drawn


@pytest.mark.parametrize("part", ["val", "test"])
def test_classes_that_differ_between_parts_are_one_message(tmp_path: Path, part: str) -> None:
    pictures(tmp_path / "pets/train", cat=2, dog=2)
    pictures(tmp_path / "pets" / part, cat=1, cot=1, eel=1)
    with pytest.raises(RunError) as caught:
        fit(recipe_of(tmp_path / "pets"), output=tmp_path / "run")
    assert str(caught.value) == (
        f"data: {tmp_path / 'pets'}: train and {part} differ in classes: cot, eel of {part} are not in train"
    )
    assert not (tmp_path / "run").exists()


def test_test_images_without_labels_are_passed_over(tmp_path: Path) -> None:
    pictures(tmp_path / "pets/train", cat=2, dog=2)
    (tmp_path / "pets/test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pets/test/0.png")  # as ImageNet and many competitions have it
    assert set(ImageData(load_recipe(recipe_of(tmp_path / "pets"))).parts) == {"train", "val"}


@pytest.mark.parametrize(
    "found",
    [{"validation": "all", "seed": 0, "share": "1/2"}, {"validation": [[1]], "seed": 0, "share": "1/2"}, {}],
)
def test_a_split_that_kw_fit_does_not_write_is_refused(found: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="which images validated"):
        Split.from_dict(found)


class Own(LightningDataModule):
    """Data of one's own with a training and a test part."""

    num_classes = 2

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 2), batch_size=4)

    def test_dataloader(self) -> Any:
        return self.train_dataloader()


def test_data_of_ones_own_has_the_parts_that_it_has_loaders_for(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe["data"] = {"name": f"python:{__name__}:Own"}
    result = fit(recipe, output=tmp_path / "run", allow_python=[__name__])
    assert (result.last, set(result.test)) == ({}, {"accuracy", "loss"})
    assert evaluate(result.folder, split="train", allow_python=[__name__]).metrics["loss"] > 0
    with pytest.raises(RunError, match='no val part: found split="val", allowed: train, test'):
        evaluate(result.folder, split="val", allow_python=[__name__])
