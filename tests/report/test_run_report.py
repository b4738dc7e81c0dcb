"""The page of a run: what it shows, what it withstands, and that it can fail without the run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_run import CLASSES, RECIPE, SCRIPT, write_pictures
from page_reader import Reader, read
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.fit import Result, evaluate, fit
from kw_lightning.report import report
from kw_lightning.report.observation import Answer, Observation, Observed
from kw_lightning.report.parts import answers
from kw_lightning.report.pictures import Normalisation


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_texts_of_strangers_are_shown_as_they_are_and_run_nothing(page: Path) -> None:
    found = read(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert [attributes for attributes in scripts if attributes.get("type") != "application/json"] == [{}]
    assert not [tag for tag, attributes in found.tags if any(name.startswith("on") for name in attributes)]
    assert SCRIPT in found.text
    assert RECIPE["description"] in found.text
    assert "$x^2 & _{" in found.text
    assert "\x1b" not in page.read_text(encoding="utf-8")


def test_the_page_names_nothing_that_would_be_fetched(page: Path) -> None:
    found = read(page)
    assert page.stat().st_size < 5e6
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"url\((?!#)|@import", page.read_text(encoding="utf-8"))


def test_every_chart_is_reached_by_keys_and_told_in_words(page: Path) -> None:
    charts = [attributes for _, attributes in read(page).tags if attributes.get("class") == "chart"]
    titles = [str(chart["aria-label"]).partition(". ")[0] for chart in charts]
    assert titles == [
        *("Loss", "Accuracy", "Learning rate", "Temperature", "Confusion matrix"),
        *("shelf: mean attention", "shelf: weights"),
    ]
    assert all(chart["tabindex"] == "0" and chart["role"] == "img" for chart in charts)
    assert all(len(str(chart["aria-label"])) > 40 for chart in charts)


def test_summary_curves_images_and_layers_are_there(page: Path, hostile: Result) -> None:
    found = read(page)
    for words in (
        f"top-1 accuracy (test, best) {hostile.test['accuracy']:.2%}",
        f"parameters {hostile.module.plan.parameters.kw:,}",
        "epochs 2 6 steps",
        "first shelf 8×3×3×3",
        "mixtures of 2 layers by",
        "recipe, SHA-256",
    ):
        assert words in found.text
    pictures = [str(a["src"]) for tag, a in found.tags if tag == "img"]
    assert (
        sum(source.startswith("data:image/png;base64,") for source in pictures) == 9 + 18
    )  # of the test, and training
    assert len(found.tags) < 20_000


def test_tables_beside_the_page_are_those_of_evaluate(page: Path, hostile: Result) -> None:
    measured = evaluate(hostile.folder)
    head, *rows = table(page.parent / "confusion.csv")
    counts = np.array([[int(value) for value in row[1:]] for row in rows])
    assert head == ["class", *sorted(CLASSES)]
    assert counts.sum() == 9
    assert np.trace(counts) / counts.sum() == pytest.approx(measured.metrics["accuracy"])
    classes = table(page.parent / "classes.csv")
    assert classes[0] == ["name", "images", "recall", "precision"]
    for row, counted, entry in zip(classes[1:], counts, measured.classes, strict=True):
        assert row[:2] == [entry["name"], str(counted.sum())]
        assert float(row[2]) == pytest.approx(entry["recall"])


def test_a_report_is_written_again_elsewhere_and_of_another_part(
    hostile: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(
        application(), ["report", str(hostile.folder), "--split", "val", "--output", str(tmp_path / "again.html")]
    )
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "again.html"))
    assert "Over the 9 validation images." in read(tmp_path / "again.html").text
    assert len(table(tmp_path / "confusion.csv")) == 4
    for arguments, told in (
        (["nowhere"], "nowhere: no such file or folder"),
        ([str(tmp_path)], "no run: neither recipe.lock.yaml nor metrics.csv"),
        ([str(hostile.folder), "--split", "tset"], 'found the unknown split "tset"'),
        ([str(hostile.folder), "--set", "data.rot=x"], "data.rot"),
    ):
        failed = CliRunner().invoke(application(), ["report", *arguments])
        assert failed.exit_code in (1, 2)
        assert told in failed.stderr


def test_without_its_data_a_run_still_shows_what_the_folder_holds(hostile: Result, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(hostile.folder, folder)
    lock = (folder / "recipe.lock.yaml").read_text()
    (folder / "recipe.lock.yaml").write_text(lock.replace("first", "frist"))  # and a lock that was changed
    (folder / "result.json").write_text('{"test": 3, "val": {"best": [1]}, "classes": [{"name": "a"}, 5], "x": 1e999}')
    (folder / "versions.json").write_text("[")
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.write_bytes(b"damaged")
    written = report(folder)
    text = read(written.path).text
    assert "Checkpoint and data were not looked at" in text
    assert "The recipe cannot be read" in text
    assert "versions.json cannot be read" in text
    assert "Confusion matrix" in text  # of the report before
    assert "Learning rate" in text


def test_statistics_of_the_last_epoch_stand_in_for_those_of_the_checkpoint(hostile: Result, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "attention").mkdir(parents=True)
    for name in ("recipe.lock.yaml", "metrics.csv"):
        shutil.copy(hostile.folder / name, folder)
    planned = hostile.module.plan.warehouses[0].partition
    mean = np.eye(planned.mixtures, planned.cells, dtype=np.float32)
    np.savez_compressed(folder / "attention/epoch=0001-step=6.npz", shelf=mean)
    text = read(report(folder).path).text
    assert "shelf: mean attention" in text
    assert "no checkpoints/last.ckpt" in text
    assert f"{planned.cells} are in use. 0% of all weights are negative" in text


def test_shares_of_time_are_those_of_kw_bench(hostile: Result, tmp_path: Path) -> None:
    layers = [{"names": ["first"], "seconds": {"kw": 3.0}}, {"names": ["second"], "seconds": {"kw": 1.0}}]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.lock.yaml", "metrics.csv"):
        shutil.copy(hostile.folder / name, folder)
    shutil.copytree(hostile.folder / "checkpoints", folder / "checkpoints")
    (folder / "bench.json").write_text(json.dumps({"networks": [{"layers": layers}]}))
    assert re.search(r"first shelf .* 75\.0% second shelf .* 25\.0%", read(report(folder).path).text)


def test_a_run_that_measures_nothing_reports_its_training(tmp_path: Path) -> None:
    table_of = write_pictures(tmp_path, each=4)
    table_of.write_text(re.sub(",(val|test)\n", ",train\n", table_of.read_text(encoding="utf-8")), encoding="utf-8")
    overrides = [f"data.root={table_of}", "data.validation=none", "train.epochs=1", "train.monitor=train/loss"]
    done = fit(RECIPE, [*overrides, "log.tensorboard=false"], output=tmp_path / "run")
    assert done.report is not None
    text = read(done.report).text
    assert "There are neither validation nor test images" in text
    assert "Learning rate" in text
    assert "Training image 12" in done.report.read_text(encoding="utf-8")
    assert "Answers" not in text
    assert not (tmp_path / "run/confusion.csv").exists()


@pytest.mark.parametrize("part", ["attention.DetailedMetric.update", "observation._answer"])
def test_watching_that_fails_leaves_the_measurement_whole(
    part: str, hostile: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(f"kw_lightning.report.{part}", fail)
    watching = Observation()
    found = evaluate(hostile.folder, observers=[watching])
    assert found.metrics["accuracy"] == hostile.test["accuracy"]
    assert watching.observed is None
    assert isinstance(watching.failure, MemoryError)


def test_vectors_have_answers_and_no_pictures() -> None:
    answer = Answer(2.5, torch.ones(6), (1,), ((0, 0.9),), "b/c.png")
    observed = Observed(np.array([[2, 0], [1, 0]]), (answer,), (), 3)
    (gallery,) = answers(observed, observed.confusion, [{"name": "a"}, {"name": "b"}], "val", Normalisation()).galleries
    (shown,) = gallery.images
    assert (shown.source, shown.caption, shown.mood) == (None, "b, told as a 90%", "wrong")
    assert shown.detail == "loss 2.5, b/c.png"


def test_a_report_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("no\nway")

    monkeypatch.setattr("kw_lightning.report.writing.read_run", fail)
    overrides = [f"data.root={write_pictures(tmp_path, each=4)}", "train.epochs=1", "log.tensorboard=false"]
    done = fit(RECIPE, overrides, output=tmp_path / "run")
    assert done.report is None
    assert done.test["accuracy"] >= 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert [record.message for record in caplog.records if "report" in record.message] == [
        "the report could not be made: ZeroDivisionError: no"
    ]


def test_recipe_plan_result_and_report_show_themselves_in_a_notebook(hostile: Result) -> None:
    again = report(hostile.folder)
    assert again.path == hostile.report
    shown = Reader(again._repr_html_())
    assert [tag for tag, _ in shown.tags] == ["iframe"]
    assert str(shown.tags[0][1]["srcdoc"]).startswith("<!DOCTYPE html>")
    for each in (hostile.module.recipe, hostile.module.plan, hostile):
        reader = Reader(each._repr_html_())
        assert {tag for tag, _ in reader.tags} <= {"div", "span", "b", "pre"}
        assert "pets" in reader.text or "run" in reader.text


def test_figures_reach_tensorboard_at_the_end(hostile: Result) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    images = {
        value.tag
        for file in (hostile.folder / "tensorboard").glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "images"
    }
    assert images == {"attention/shelf", "attention/shelf-weights", "confusion"}
