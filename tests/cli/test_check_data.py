"""`kw check --data` opens every image once, and `data.broken` says what training makes of those that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.errors import RunError
from kw_lightning.fit import fit

RECIPE = """
kw: 1
model: {input: [3, 8, 8], layers: [Flatten, {Dense: {units: auto}}]}
data: {name: image_folder, root: pets, batch_size: 4, train: {size: 8}}
train: {epochs: 1, accelerator: cpu}
log: {tensorboard: false}
"""


def check(*arguments: str) -> Result:
    return CliRunner().invoke(application(), ["check", "pets.yaml", "--data", *arguments])


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / part / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / "pets" / part / label / f"{number}.png")
    (tmp_path / "pets.yaml").write_text(RECIPE)
    return tmp_path / "pets"


def break_two(pets: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pets / "train/cat/1.png")
    whole = (pets / "train/cat/1.png").read_bytes()
    (pets / "train/cat/1.png").write_bytes(whole[: len(whole) // 2])
    (pets / "val/cat/0.png").write_text("no image")


def test_sound_images_are_no_mistake(pets: Path) -> None:
    result = check()
    assert (result.exit_code, result.stdout) == (0, "pets.yaml: no mistakes\n")
    assert result.stderr == "pets: opened 12 images, 0 cannot be read\n"


def test_damaged_images_and_empty_classes_are_named(pets: Path) -> None:
    break_two(pets)
    (pets / "val/eel").mkdir()
    result = check()
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "pets/val/eel: a class without images"
    assert lines[1].startswith("pets/train/cat/1.png: the image cannot be read")
    assert lines[2].startswith("pets/val/cat/0.png: not an image of a known format")
    assert len(json.loads(check("--format", "json").stdout)) == 3


def test_odd_images_are_told_and_no_mistake(pets: Path) -> None:
    Image.new("L", (8, 8)).save(pets / "train/cat/0.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(pets / "train/dog/0.png")
    (pets / "train/dog/notes.txt").write_text("x")
    result = check()
    assert result.exit_code == 0
    assert result.stderr.splitlines()[:-1] == [
        "pets/train/cat/0.png: 1 channel (L), most images have 3; read as RGB",
        "pets/train/dog/0.png: 16 bits a channel; scaled to 8",
        "pets/train/dog/notes.txt: does not end as images do; passed over",
    ]


def test_mistakes_of_the_recipe_come_first(pets: Path) -> None:
    Path("pets.yaml").write_text(RECIPE.replace("batch_size", "batchsize"))
    break_two(pets)
    assert check().exit_code == 2
    Path("pets.yaml").write_text(RECIPE.replace("root: pets", "root: nowhere"))
    result = check()
    assert (result.exit_code, result.stdout.count("\n")) == (1, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_where_the_recipe_says_so(pets: Path, workers: int) -> None:
    break_two(pets)
    where = [f"data.workers={workers}"]
    with pytest.raises(RunError, match=r"pets/val/cat/0\.png: not an image of a known format"):
        fit("pets.yaml", where, output="refused")
    result = fit("pets.yaml", [*where, "data.broken=skip"], output="run")
    fifths = result.last["accuracy"] * 5  # five images are left to evaluate
    assert fifths == pytest.approx(round(fifths), abs=1e-5)
    assert 0 < fifths < 5  # all the same, of two classes
    Path("pets.yaml").write_text(RECIPE.replace("batch_size", "broken: skip, batch_size"))
    assert check().exit_code == 0
    assert "pets/val/cat/0.png: not an image of a known format, or a damaged one; left out" in check().stderr


def test_broken_images_only_end_the_run(pets: Path) -> None:
    for number in range(3):
        (pets / "train/cat" / f"{number}.png").write_text("no image")
        (pets / "train/dog" / f"{number}.png").write_text("no image")
    with pytest.raises(RunError, match="data: no image can be read"):
        fit("pets.yaml", ["data.broken=skip"], output="run")
