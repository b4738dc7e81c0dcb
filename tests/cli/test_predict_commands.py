"""`kw predict`, `kw export` and `kw import` as a user runs them, on a run of `kw-fit`."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from kw_lightning.cli import application
from kw_lightning.fit import evaluate, fit
from kw_lightning.fit.data import data_module
from kw_lightning.inference import load
from kw_lightning.recipe import load_recipe

QUICK = [
    "vars.stem=16",
    "vars.first=16",
    "vars.second=16",
    "train.epochs=1",
    "temperature.epochs=0.5",
    "log.report=false",
]


def kw(*arguments: object) -> Result:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    fit("digits-resnet", [*QUICK, "data.train.samples=100", "data.eval.samples=60"], output=folder)
    return folder


@pytest.fixture(scope="module")
def pictures(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Return a folder with the images that the run was evaluated on, and their classes."""
    folder = tmp_path_factory.mktemp("pictures")
    data = data_module(load_recipe(run / "recipe.lock.yaml"))
    samples = data.parts["test"].samples
    targets = []
    for index in range(len(samples)):
        image, target = samples[index]
        Image.fromarray(np.asarray(image).squeeze(0)).save(folder / f"{index:03}.png")
        targets.append(int(target))
    return folder, targets


def test_predictions_agree_with_evaluate_image_by_image(
    run: Path, pictures: tuple[Path, list[int]], tmp_path: Path
) -> None:
    folder, targets = pictures
    done = kw("predict", run, folder, "--output", tmp_path / "p.csv", "--top", 2)
    assert done.exit_code == 0, done.output
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == [f"{index:03}.png" for index in range(len(targets))]
    right = sum(row["label"] == str(target) for row, target in zip(rows, targets, strict=True))
    assert right / len(targets) == pytest.approx(evaluate(run).metrics["accuracy"], abs=1e-6)
    assert all(float(row["score"]) >= float(row["score_2"]) for row in rows)


def test_run_folder_model_folder_and_checkpoint_answer_alike(run: Path, pictures: tuple[Path, list[int]]) -> None:
    image = pictures[0] / "000.png"
    answers = [
        load(source).predict(image, top=10) for source in (run, run / "model", run / "checkpoints" / "last.ckpt")
    ]
    assert dict(answers[0].top) == pytest.approx(dict(answers[1].top), abs=1e-6)
    assert dict(answers[0].top) == pytest.approx(dict(answers[2].top), abs=1e-6)


def test_without_a_file_a_line_an_image_is_printed(run: Path, pictures: tuple[Path, list[int]]) -> None:
    done = kw("predict", run, pictures[0] / "00[01].png")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        str(pictures[0] / "000.png"),
        str(pictures[0] / "001.png"),
    ]


def test_a_cut_image_is_a_row_and_no_failure(run: Path, pictures: tuple[Path, list[int]], tmp_path: Path) -> None:
    whole = (pictures[0] / "000.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[:60])
    done = kw("predict", run, tmp_path, "--output", tmp_path / "p.json")
    assert done.exit_code == 0
    assert "1 of 2 images" in done.stderr
    good, bad = json.loads((tmp_path / "p.json").read_text())
    assert good["problem"] is None
    assert "b.png" in bad["problem"]
    assert bad["label"] is None


def test_ctrl_c_keeps_what_was_predicted(run: Path, pictures: tuple[Path, list[int]], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    names = [str(pictures[0] / f"{index:03}.png") for index in range(3)]
    (tmp_path / "images.csv").write_text("\n".join(["path", *names, str(pipe)]))

    def interrupt() -> None:
        with pipe.open("wb"):  # once somebody reads there
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    for output, lines in ((["--output", tmp_path / "p.csv"], 0), ([], 3)):
        thread = threading.Thread(target=interrupt)
        thread.start()
        done = kw("predict", run, tmp_path / "images.csv", "--batch-size", 1, *output)
        thread.join()
        assert done.exit_code == 130
        assert "Interrupted: 3 of 4 images" in done.stderr
        assert len(done.stdout.splitlines()) == lines
    with (tmp_path / "p.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


def test_a_reader_that_is_ended_is_one_line(run: Path, pictures: tuple[Path, list[int]], tmp_path: Path) -> None:
    def kill() -> None:
        while not (readers := multiprocessing.active_children()):
            time.sleep(0.001)
        readers[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    done = kw("predict", run, *[pictures[0]] * 50, "--workers", 1, "--output", tmp_path / "p.csv")
    thread.join()
    assert done.exit_code == 1
    assert "ended from outside, as systems do that run out of memory; make --batch-size or" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", "."], "nope: no such file or folder"),
        (["RUN", "nope.png"], "nope.png: no such file, and no file matches it"),
        (["RUN", "PICTURES", "--output", "p.xls"], 'found "p.xls", allowed: NAME.csv, NAME.json, NAME.parquet'),
        (["RUN", "PICTURES", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_mistakes_are_one_line_on_standard_error(
    run: Path, pictures: tuple[Path, list[int]], arguments: list[str], message: str
) -> None:
    places = {"RUN": str(run), "PICTURES": str(pictures[0]), ".": str(pictures[0])}
    done = kw("predict", *(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_published_checkpoint_becomes_a_network_and_goes_back(tmp_path: Path) -> None:
    from kw_lightning.builder import build
    from kw_lightning.published import read_published, to_published

    recipe = load_recipe("resnet18-kw-1d4x")
    tensors = to_published(build(recipe), "torchvision/resnet18")
    torch.save({"model": tensors}, tmp_path / "official.pth")
    done = kw("import", tmp_path / "official.pth", "--output", tmp_path / "network")
    assert done.exit_code == 0, done.output
    assert "a network of resnet18-kw-1d4x" in done.stderr
    found = load(tmp_path / "network")
    assert found.classes[0] == "tench"
    done = kw("export", tmp_path / "network", "--to", "official", "--output", tmp_path / "back.pth")
    assert done.exit_code == 0, done.output
    back = read_published(tmp_path / "back.pth")
    assert list(back) == list(tensors)
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    wrong = kw("import", tmp_path / "official.pth", "--recipe", "resnet18-kw-1x", "--output", tmp_path / "other")
    assert wrong.exit_code == 1
    assert "does not fit the recipe resnet18-kw-1x" in wrong.stderr
    assert wrong.stderr.strip().endswith("it fits the recipe resnet18-kw-1d4x")
    assert not (tmp_path / "other").exists()


def test_configuration_becomes_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "kw2x_resnet18.json").write_text(json.dumps({"model": "kw_resnet18", "cell_num_ratio": 2, "lr": 4e-3}))
    done = kw("import", tmp_path / "kw2x_resnet18.json", "--output", tmp_path / "mine.yaml")
    assert done.exit_code == 0
    assert done.stderr.strip() == "Not in the recipe, since they are of the training: lr"
    assert load_recipe(tmp_path / "mine.yaml").name == "kw2x-resnet18"


def test_export_of_an_unknown_form_names_those_there_are(run: Path, tmp_path: Path) -> None:
    done = kw("export", run, "--to", "offical", "--output", tmp_path / "x")
    assert done.exit_code == 1
    forms = "onnx, torch, openvino, executorch, executorch-portable, static, int8, int8-weights, official"
    assert f'found "offical", allowed: {forms}; did you mean "official"?' in done.stderr


@pytest.mark.parametrize(
    ("form", "name", "reason"),
    [
        ("onnx", "no/x.onnx", "No such file or directory"),
        ("static", "file/x", "Not a directory"),
        ("int8-weights", "file/no/x", "Not a directory"),
    ],
)
def test_export_tells_where_nothing_can_be_written_before_it_computes(
    run: Path, tmp_path: Path, form: str, name: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    done = kw("export", run, "--to", form, "--output", tmp_path / name)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(rf"{tmp_path}/\S+ cannot be written: {reason}\n", done.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_folding_prints_what_it_costs_and_gives_a_network_that_predicts(
    run: Path, pictures: tuple[Path, list[int]], tmp_path: Path
) -> None:
    done = kw("export", run, "--to", "static", "--output", tmp_path / "new" / "static", "--samples", 40)
    assert done.exit_code == 0, done.output
    rows = [line.split("│") for line in done.stdout.splitlines() if "│" in line]
    (everything,) = [row for row in rows if "all images" in row[1]]
    assert float(everything[2].strip().rstrip("%")) / 100 == pytest.approx(evaluate(run).metrics["accuracy"], abs=1e-4)
    assert [row[1].strip() for row in rows if row[1].strip().isdigit()] == [str(digit) for digit in range(10)]
    assert load(tmp_path / "new" / "static").predict(pictures[0] / "000.png").label in map(str, range(10))
