"""A saved network: the same answers in another process, without pickle, and refused when changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

import kw_lightning
from kw_lightning.errors import RunError
from kw_lightning.inference import ImageClassifier
from kw_lightning.nn import set_temperature

LOAD = """
import pickle, sys
import torch
import kw_lightning
from kw_lightning.inference import load
def refuse(*arguments, **options):
    raise AssertionError("a pickle was read")
torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
model = kw_lightning.load(sys.argv[1])
torch.manual_seed(0)
print(model(torch.randn(3, 3, 16, 16)).double().flatten().tolist())
"""


@pytest.fixture
def folder(classifier: ImageClassifier, tmp_path: Path) -> Path:
    classifier.save_pretrained(tmp_path / "model", metrics={"test": {"accuracy": 0.5, "loss": 1.25}})
    return tmp_path / "model"


def test_logits_are_equal_in_a_process_that_reads_no_pickle(classifier: ImageClassifier, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    with torch.no_grad():
        expected = classifier(torch.randn(3, 3, 16, 16))
    assert torch.allclose(torch.tensor(json.loads(done.stdout)).reshape(3, 10).float(), expected, atol=1e-6)


def test_files_are_those_that_others_can_open(classifier: ImageClassifier, folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "classes.json",
        "config.json",
        "model.safetensors",
        "preprocess.json",
        "recipe.lock.yaml",
    ]
    assert (
        len({file.stat().st_mode for file in folder.iterdir()}) == 1
    )  # as this user's files are: others may read them
    assert json.loads((folder / "classes.json").read_text()) == list(classifier.classes)
    assert json.loads((folder / "preprocess.json").read_text())["size"] == 16
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sum("warehouse.cells" in key for key in file.keys()) == 1  # noqa: SIM118  # no mapping


def test_card_is_valid_and_says_what_was_measured(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "kw_lightning"
    assert card.data.license == "unknown"
    assert "| test | accuracy | 0.5000 |" in card.text
    assert "| stage | 2 |" in card.text


def test_metrics_are_those_of_parts_of_the_data(classifier: ImageClassifier, tmp_path: Path) -> None:
    message = 'found "accuracy" of 0.5, allowed: the metrics of a part of the data, as {"test": {"accuracy": 0.97}}'
    with pytest.raises(TypeError, match=re.escape(message)):
        classifier.save_pretrained(tmp_path / "saved", metrics={"accuracy": 0.5})
    assert not (tmp_path / "saved").exists()


def test_temperature_comes_back(classifier: ImageClassifier, tmp_path: Path) -> None:
    set_temperature(classifier, 0.375)
    try:
        classifier.save_pretrained(tmp_path / "warm")
    finally:
        set_temperature(classifier, 1.0)
    found = kw_lightning.load(tmp_path / "warm")
    (warehouse,) = kw_lightning.nn.warehouses(found).values()
    assert float(warehouse.temperature) == 0.375


def test_loading_draws_no_random_number(folder: Path) -> None:
    torch.manual_seed(7)
    kw_lightning.load(folder)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.lock.yaml", "preprocess.json", "classes.json"])
def test_a_changed_file_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} was changed after it was saved"):
        kw_lightning.load(folder)


def test_the_card_may_be_changed(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    assert kw_lightning.load(folder).classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "found an empty list, allowed: a map"),
        ("{", "cannot be read"),
        ('{"format": "other/2"}', 'found the format "other/2", allowed: kw_lightning/1'),
        ('{"format": "kw_lightning/1", "sha256": 3}', "was changed after it was saved"),
    ],
)
def test_a_strangers_config_is_one_message(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(RunError) as caught:
        kw_lightning.load(folder)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "classes.json").unlink()
    with pytest.raises(RunError, match=r"classes\.json is missing"):
        kw_lightning.load(folder)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file or folder"):
        kw_lightning.load(tmp_path / "nope")
    with pytest.raises(RunError, match=r"nowhere\.ckpt: no such file or folder; a run or a checkpoint is needed"):
        kw_lightning.load(tmp_path / "nowhere.ckpt", overrides=["data.eval.size=8"])


def test_a_program_for_others_is_said_to_be_one(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    for given in ({}, {"classes": ["a", "b", "c"]}):
        message = (
            "changes and names of classes" if given else r"program\.pt2: a file for torch\.export\.load; a run, a check"
        )
        with pytest.raises(RunError, match=message):
            kw_lightning.load(tmp_path / "program.pt2", **given)


@pytest.mark.parametrize("option", ["override", "map_location"])
def test_an_unknown_argument_is_refused(folder: Path, option: str) -> None:
    message = f'found the unknown argument "{option}", allowed: overrides, classes, allow_python'
    with pytest.raises(TypeError, match=message):
        kw_lightning.load(folder, **{option: "cpu"})
