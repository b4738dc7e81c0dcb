"""Images of several classes at once: from a table `cat;dog` to predictions."""

import csv
import json
import os
import re
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_exact_match
from typer.testing import CliRunner

import kw_lightning
from kw_lightning import load_recipe
from kw_lightning.cli import application
from kw_lightning.errors import RunError
from kw_lightning.fit import fit
from kw_lightning.fit.module import Classifier

COLOURS = ("red", "green", "blue")
SHORTER = ["train.accelerator=cpu", "log.tensorboard=false"]
SMALL = {
    "kw": 1,
    "name": "small",
    "model": {"input": [3, 8, 8], "layers": ["GlobalAveragePooling2D", {"Dense": {"units": "auto"}}]},
    "data": {
        "name": "csv",
        "root": "colours.csv",
        "labels": "several",
        "batch_size": 8,
        "train": {"size": 8},
        "eval": {"size": 8},
    },
    "train": {"epochs": 15, "optimizer": {"lr": 0.2}, "class_weights": "balanced"},
}


def kw(*arguments: object) -> Result:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


def labels_of(name: str) -> list[int]:
    return [int(digit) for digit in Path(name).stem.split("-")[1]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures in which any of three colours is bright, a table of them, and a network that has learnt them."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "pictures").mkdir()
    rows = ["path,label,split"]
    for number, bright in product(range(4), product((0, 1), repeat=3)):
        name = f"pictures/{number}-{''.join(map(str, bright))}.png"
        colour: Any = tuple(40 + 5 * number + 170 * value for value in bright)
        Image.new("RGB", (16, 16), colour).save(folder / name)
        label = ";".join(colour for colour, value in zip(COLOURS, bright, strict=True) if value)
        rows.append(f"{name},{label},{'val' if number == 3 else ''}")
    (folder / "colours.csv").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "small.yaml").write_text(json.dumps(SMALL))
        trained = kw("fit", "small.yaml", *SHORTER)
        assert trained.exit_code == 0, trained.output
        assert "mean average precision" in trained.stdout
        yield folder


def evaluated(*arguments: object) -> dict[str, float]:
    found = kw("evaluate", *arguments, "--json")
    assert found.exit_code == 0, found.output
    values: dict[str, float] = json.loads(found.stdout)
    return values


def test_the_report_names_all_labels_of_an_image_and_has_no_confusion(here: Path) -> None:
    page = (here / "runs/small-1/report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" not in page
    assert "average precision" in page
    assert re.search(r"<span>(red|green|blue), (red|green|blue).*, told as ", page)
    assert "no class, told as no class" in page
    assert not (here / "runs/small-1/confusion.csv").exists()
    lines = (here / "runs/small-1/classes.csv").read_text().splitlines()
    assert lines[0] == "name,images,recall,precision,average_precision"
    assert sorted(line.split(",")[0] for line in lines[1:]) == sorted(COLOURS)


def test_a_network_learns_several_labels_and_evaluates_as_it_ended(here: Path) -> None:
    result = json.loads((here / "runs/small-1/result.json").read_text())["val"]
    assert (result["last"]["map"], result["last"]["f1"], result["last"]["exact"]) == (1, 1, 1)
    again = evaluated("runs/small-1")
    assert {name: again[name] for name in ("map", "f1", "exact", "loss")} == pytest.approx(
        {name: result["best"][name] for name in ("map", "f1", "exact", "loss")}
    )
    written = json.loads((here / "runs/small-1/result.json").read_text())["classes"]
    assert [(entry["name"], entry["images"], entry["average_precision"]) for entry in written] == [
        (colour, 4, 1) for colour in sorted(COLOURS)
    ]
    assert "An image may be of several of them at once" in (here / "runs/small-1/model/README.md").read_text()
    assert "average precision" in kw("evaluate", "runs/small-1").stdout
    model = kw_lightning.load("runs/small-1/checkpoints/last.ckpt")
    (prediction,) = model.predict(["pictures/3-101.png"], threshold=0.5)
    assert {label for label, _ in prediction.top} == {"red", "blue"}


def test_a_table_of_several_labels_gives_a_recipe_that_trains_as_it_stands(here: Path) -> None:
    new = kw("new", "colours", "--data", "colours.csv", "--from", "torchvision/squeezenet1_1")
    assert new.exit_code == 0, new.output
    assert "32 images, 3 classes: blue, green, red" in new.stderr
    assert 'several labels an image, separated by ";": 1.5 on average' in new.stderr
    assert "class_weights" not in Path("colours.yaml").read_text()  # the colours are equally often bright
    recipe = load_recipe("colours.yaml")
    assert recipe.several
    assert recipe.train is not None
    assert (recipe.train.loss.name, recipe.train.monitor) == ("bce", "val/map")
    shorter = ["train.epochs=1", "temperature.epochs=1", "train.mixup=0.2", "train.cutmix=0.2"]
    trained = kw("fit", "colours.yaml", *shorter, *SHORTER, "log.report=false")
    assert trained.exit_code == 0, trained.output


def test_predictions_agree_with_the_evaluation(here: Path) -> None:
    predicted = kw("predict", "runs/small-1", "pictures/3-*.png", "--top", 3, "--output", "all.csv")
    assert predicted.exit_code == 0, predicted.output
    with (here / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    answers = [{row[f"label{end}"]: float(row[f"score{end}"]) for end in ("", "_2", "_3")} for row in rows]
    scores = torch.tensor([[answer[colour] for colour in COLOURS] for answer in answers])
    targets = torch.tensor([labels_of(row["path"]) for row in rows])
    found = evaluated("runs/small-1")
    assert float(multilabel_average_precision(scores, targets, 3)) == pytest.approx(found["map"])
    assert float(multilabel_exact_match(scores, targets, 3)) == pytest.approx(found["exact"])


def test_classes_from_one_half_on_are_named_unless_another_threshold_is_given(here: Path) -> None:
    model = kw_lightning.load("runs/small-1")
    assert model.saved.several
    assert kw_lightning.load("runs/small-1/checkpoints/last.ckpt").saved.several
    scores = dict(model.predict("pictures/0-110.png").top)
    assert set(scores) == set(COLOURS)
    assert kw("predict", "runs/small-1", "pictures/0-110.png", "--output", "one.json").exit_code == 0
    (row,) = json.loads(Path("one.json").read_text())
    named = {value for key, value in row.items() if key.startswith("label") and value}
    assert named == {colour for colour, score in scores.items() if score >= 0.5}
    for threshold, count in ((0, 3), (1, 0)):
        assert len(model.predict("pictures/0-110.png", threshold=threshold).top) == count
    nothing = kw("predict", "runs/small-1", "pictures/0-110.png", "--threshold", 1)
    assert (nothing.exit_code, nothing.stdout.strip()) == (0, "pictures/0-110.png  no class from 1 on")


def test_a_run_of_several_labels_goes_on_to_the_bit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "train.epochs=2",
        "train.ema.decay=0.9",
        "data.train.noise=0.1",
        "train.mixup=0.2",
        "log.report=false",
        *SHORTER,
    ]
    unbroken = fit("small.yaml", options, output="unbroken")
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == 3:  # of the second epoch, after an evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("small.yaml", options, output="broken")
    resumed = fit("small.yaml", options, resume="broken")
    first, second = unbroken.module.network.state_dict(), resumed.module.network.state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert resumed.last == unbroken.last


def test_targets_of_ones_own_data_have_a_place_for_each_class(here: Path) -> None:
    recipe = {**SMALL, "model": {"input": [3, 8, 8], "layers": ["Flatten", {"Dense": {"units": 3}}]}}
    with pytest.raises(RunError, match=r"several needs targets \[batch, classes\] of 0 and 1: found the shape \[2\]"):
        Classifier(recipe).training_step((torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), 0)


def test_what_goes_with_one_label_only_is_refused_with_its_place(here: Path) -> None:
    refused = kw("fit", "small.yaml", "train.loss=cross_entropy", "data.sampling=balanced")
    assert refused.exit_code == 2
    assert "train.loss: found cross_entropy with several labels an image, allowed: bce or focal" in refused.stderr
    assert "data.sampling: found balanced with several labels an image, allowed: each; try" in refused.stderr
    monitor = kw("fit", "small.yaml", "train.monitor=val/accuracy")
    assert monitor.exit_code == 2
    assert 'train.monitor: found the unknown metric "val/accuracy", allowed: val/map, val/f1' in monitor.stderr
    elsewhere = kw("fit", "digits-resnet", "data.labels=several")
    assert "data.labels: found several with digits, allowed: csv, hf/… or data of one's own" in elsewhere.stderr
    single = kw("fit", "small.yaml", "data.labels=one", "data.args.separator=|")
    assert "data.args.separator: found separator with one label an image" in single.stderr
