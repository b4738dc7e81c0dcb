"""From a folder of pictures of one's own, or a table of them, to predictions: three lines."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from kw_lightning import load_recipe
from kw_lightning.cli import application
from kw_lightning.cli.own_data import training_for

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "eel": (30, 30, 200)}
SHORTER = [
    "train.epochs=1",
    "temperature.epochs=1",
    "train.accelerator=cpu",
    "log.tensorboard=false",
    "log.report=false",
]


def kw(*arguments: object) -> Result:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of three classes, two new ones, and a table of them."""
    monkeypatch.chdir(tmp_path)
    rows = ["path,label,split"]
    for label, colour in COLOURS.items():
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(12 if label == "cat" else 3):
            Image.new("RGB", (20 + number, 24), colour).save(tmp_path / "pets" / label / f"{number}.png")
            rows.append(f"pets/{label}/{number}.png,{label},{'val' if number == 2 else ''}")
    (tmp_path / "pets.csv").write_text("\n".join(rows))
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (22, 22), COLOURS[name]).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("data", ["pets", "pets.csv"])
def test_three_lines_from_pictures_to_predictions(here: Path, data: str) -> None:
    new = kw("new", "pets", "--data", data, "--from", "torchvision/resnet18")
    assert new.exit_code == 0, new.output
    found = new.stderr.splitlines()
    assert found[0] == f"{data}: 18 images, 3 classes: cat, dog, eel"
    assert "looked at 18: 20×24 to 31×24 pixels" in found[2]
    assert ("unequal, 4.0 times" in found[3]) is (data == "pets")
    assert ("a tenth of training validates" in found[1]) is (data == "pets")
    assert "# class_weights: balanced" in (here / "pets.yaml").read_text()
    recipe = load_recipe("pets.yaml")
    assert recipe.model is not None
    assert recipe.model.args == {"num_classes": "auto"}
    assert recipe.model.input == (3, 32, 32)  # as small as the pictures
    assert ("validation: 0.1" in (here / "pets.yaml").read_text()) is (data == "pets")
    trained = kw("fit", "pets.yaml", *SHORTER)
    assert trained.exit_code == 0, trained.output
    predicted = kw("predict", "runs/pets-1", "pictures", "--top", 3, "--output", "predictions.csv")
    assert predicted.exit_code == 0, predicted.output
    with (here / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == ["cat.png", "dog.png"]
    for row in rows:
        labels = {value for key, value in row.items() if key.startswith("label")}
        assert labels == set(COLOURS)


def test_files_that_are_passed_over_are_counted_by_their_ending(here: Path) -> None:
    for name in ("a.gif", "b.GIF", "c.avif", "notes"):
        (here / "pets/cat" / name).touch()
    new = kw("new", "pets", "--data", "pets", "--from", "torchvision/resnet18")
    assert new.exit_code == 0, new.output
    told = "passed over, since they do not end as images do: 2 .gif, 1 .avif, 1 without an ending"
    assert told in new.stderr.splitlines()


def test_what_the_folder_lacks_is_said_before_anything_is_written(here: Path) -> None:
    nowhere = kw("new", "x", "--data", "nowhere", "--from", "torchvision/resnet18")
    assert (nowhere.exit_code, nowhere.stderr.count("\n")) == (1, 1)
    assert "nowhere holds no images in class folders: there is no such folder" in nowhere.stderr
    (here / "pets.csv").write_text("path,label\npets/cat/99.png,cat\n")
    table = kw("new", "x", "--data", "pets.csv", "--from", "torchvision/resnet18")
    assert "pets.csv:2: there is no file pets/cat/99.png" in table.stderr
    assert not (here / "x.yaml").exists()


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        ("lraspp_mobilenet_v3_large", "with answers [1, 21, 32, 32], allowed: [batch, classes]"),
        ("r3d_18", "for samples [3, 16, 112, 112], allowed: [channels, height, width]"),
    ],
)
def test_a_network_that_does_not_tell_images_apart_is_refused(here: Path, backbone: str, found: str) -> None:
    refused = kw("new", "x", "--data", "pets", "--from", f"torchvision/{backbone}")
    expected = f'--data trains on images by class: found "torchvision/{backbone}" {found}\n'
    assert (refused.exit_code, refused.stderr) == (1, expected)
    assert not (here / "x.yaml").exists()


def test_a_network_whose_answers_only_running_shows_is_warned_of(here: Path) -> None:
    detector = "torchvision/ssdlite320_mobilenet_v3_large"
    done = kw("new", "x", "--data", "pets", "--from", detector)
    assert done.exit_code == 0
    assert f'whether "{detector}" answers in classes shows only where it runs' in done.stderr
    assert kw("new", "y", "--data", "pets", "--from", "torchvision/resnet18").stderr.count("warning") == 0


def test_classes_that_differ_between_parts_are_refused_before_training(here: Path) -> None:
    assert kw("new", "pets", "--data", "pets.csv", "--from", "torchvision/resnet18").exit_code == 0
    (here / "pets.csv").write_text("path,label,split\npets/cat/0.png,cat,train\npets/dog/0.png,dog,val\n")
    for refused in (
        kw("fit", "pets.yaml", *SHORTER),
        kw("new", "x", "--data", "pets.csv", "--from", "torchvision/resnet18"),
    ):
        assert refused.exit_code == 1
        assert "train and validation differ in classes: dog of validation is not in train" in refused.stderr
    assert not (here / "runs").exists()
    assert not (here / "x.yaml").exists()


def test_a_single_class_is_refused_before_a_recipe_is_written(here: Path) -> None:
    (here / "outer").mkdir()
    (here / "pets").rename(here / "outer" / "pets")  # as archives often unpack
    refused = kw("new", "x", "--data", "outer", "--from", "torchvision/resnet18")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert 'found a single class, "pets", allowed: two or more' in refused.stderr
    assert not (here / "x.yaml").exists()


def test_pretrained_weights_keep_the_size_they_were_trained_with(here: Path) -> None:
    assert kw("new", "pets", "--data", "pets", "--from", "torchvision/resnet18", "--pretrained").exit_code == 0
    recipe = load_recipe("pets.yaml")
    assert recipe.model is not None
    assert (recipe.model.pretrained, recipe.model.input) == (True, (3, 224, 224))
    assert kw("plan", "pets.yaml").exit_code == 0


def test_fewer_images_train_for_more_epochs_in_smaller_batches() -> None:
    some = [training_for(images, pretrained=False) for images in (10, 1_000, 20_000, 1_000_000)]
    assert [training.epochs for training in some] == [200, 200, 60, 60]
    assert [training.batch_size for training in some] == [8, 64, 64, 128]
    assert all(1 <= training.warmup <= training.annealing <= training.epochs for training in some)
    assert training_for(1_000, pretrained=True).epochs == 30


def test_evaluation_needs_no_training_images_and_keeps_the_classes_numbers(here: Path) -> None:
    recipe = {
        "kw": 1,
        "name": "pets",
        "model": {"input": [3, 8, 8], "layers": ["Flatten", {"Dense": {"units": "auto"}}]},
        "data": {"name": "image_folder", "root": "pets", "batch_size": 8, "train": {"size": 8}, "eval": {"size": 8}},
    }
    (here / "pets.yaml").write_text(json.dumps(recipe))
    assert kw("fit", "pets.yaml", "train.epochs=30", "train.optimizer.lr=0.01", *SHORTER[2:]).exit_code == 0
    for part, label in (("val", "dog"), ("test", "eel")):  # of the three classes the second and the third
        folder = here / part / "other" / part / label
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20), COLOURS[label]).save(folder / "0.png")
        found = kw("evaluate", "runs/pets-1", f"data.root={folder.parents[1]}", "--json")
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["accuracy"] == 1
    (folder.parent / "fish").mkdir()
    Image.new("RGB", (20, 20)).save(folder.parent / "fish" / "0.png")
    unknown = kw("evaluate", "runs/pets-1", f"data.root={folder.parents[1]}")
    assert unknown.exit_code == 1
    assert unknown.stderr.strip().endswith("the network knows no class fish")
