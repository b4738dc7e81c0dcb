"""Tables of predictions."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from kw_lightning.errors import RunError
from kw_lightning.inference import Prediction, write_predictions, writer_of

PREDICTIONS = [
    Prediction((("cat", 0.75), ("dog, small", 0.25)), "a.png"),
    Prediction(path="b.png", problem="b.png: cut"),
]


def test_csv_has_one_row_an_image(tmp_path: Path) -> None:
    write_predictions(PREDICTIONS, tmp_path / "p.csv", 2)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "score", "label_2", "score_2", "problem"],
        ["a.png", "cat", "0.75", "dog, small", "0.25", ""],
        ["b.png", "", "", "", "", "b.png: cut"],
    ]


def test_json_has_one_object_an_image(tmp_path: Path) -> None:
    write_predictions(PREDICTIONS, tmp_path / "p.json", 1)
    assert json.loads((tmp_path / "p.json").read_text()) == [
        {"path": "a.png", "label": "cat", "score": 0.75, "problem": None},
        {"path": "b.png", "label": None, "score": None, "problem": "b.png: cut"},
    ]


def test_parquet_is_read_back(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_predictions(PREDICTIONS, tmp_path / "p.parquet", 1)
    assert parquet.read_table(tmp_path / "p.parquet").to_pylist()[0]["label"] == "cat"


def test_another_ending_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'found "p\.txt", allowed: NAME\.csv, NAME\.json, NAME\.parquet'):
        write_predictions(PREDICTIONS, tmp_path / "p.txt", 1)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written: No such file or directory"):
        write_predictions(PREDICTIONS, tmp_path / "no" / "p.csv", 1)


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, reason in (("no/p.csv", "No such file or directory"), ("folder.csv", "Is a directory")):
        with pytest.raises(RunError, match=f"{name} cannot be written: {reason}"):
            writer_of(tmp_path / name)
    writer_of(tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()
    (tmp_path / "p.csv").write_text("before")
    writer_of(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text() == "before"


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.parquet"])
def test_a_name_that_is_no_utf_8_is_a_row_too(tmp_path: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    write_predictions([Prediction((("cat", 1.0),), os.fsdecode(b"k\xe4fer.png"))], tmp_path / name, 1)
    assert rb"k\udce4fer.png" in (tmp_path / name).read_bytes().replace(rb"\\", b"\\")
