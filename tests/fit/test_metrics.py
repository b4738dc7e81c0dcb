"""metrics.csv: one row a step, step and epoch first, and damage that stops nothing."""

import csv
import logging
from pathlib import Path

import pytest

from kw_lightning.fit import fit
from kw_lightning.fit.metrics import MetricsTable, read_metrics


def test_what_is_logged_at_one_step_is_one_row(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    table.log_metrics({"train/loss": 0.25, "epoch": 0}, step=9)
    assert table.path.read_text() == "step,epoch,train/loss,val/loss\n9,0,0.25,0.5\n"
    table.log_metrics({"train/loss": float("nan"), "epoch": 1}, step=19)
    table.log_metrics({"val/loss": 2.0, "epoch": 1}, step=19)
    assert table.path.read_text().splitlines()[1:] == ["9,0,0.25,0.5", "19,1,nan,2"]
    table.log_metrics({"train/loss": 3.0}, step=20)
    assert table.path.read_text().splitlines()[2:] == ["19,1,nan,2", "20,,3,"]
    assert read_metrics(table.path)[0] == {"step": 9, "epoch": 0, "train/loss": 0.25, "val/loss": 0.5}


def test_a_resumed_table_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsTable(tmp_path / "metrics.csv")
    for step in range(5):
        first.log_metrics({"x": step / 2, "epoch": 0}, step=step)
    again = MetricsTable(tmp_path / "metrics.csv", steps=3)
    again.log_metrics({"x": 9.5, "epoch": 0}, step=3)
    assert again.path.read_text().split() == ["step,epoch,x", "0,0,0", "1,0,0.5", "2,0,1", "3,0,9.5"]
    MetricsTable(tmp_path / "metrics.csv").log_metrics({"y": 1.5}, step=0)
    assert again.path.read_text().split() == ["step,y", "0,1.5"]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"step,epoch,x\n0,0,1.5\n1,0,2", 2),
        (b"step,epoch,x\n0,0,1.5\n1,", 1),
        (b"step,epoch,x\n0,0,1.5\n\x00\x00\x00\x00", 1),
        (b"\xff\xfe\x00\x01" * 50, 0),
        (b"", 0),
        (b"step,epoch,x\n0,0,1.5\n1,0,one\n\xd7", 1),
    ],
)
def test_a_cut_or_binary_file_stops_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, kept: int
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert len(read_metrics(path)) == kept
    assert ("damaged" in caplog.text) == (kept < 2)
    table = MetricsTable(path, steps=100)
    table.log_metrics({"x": 7.5, "epoch": 3}, step=100)
    assert path.read_text().splitlines()[-1] == "100,3,7.5"


def test_a_run_writes_a_row_an_epoch_and_goes_on_behind_damage(tmp_path: Path, quick: list[str]) -> None:
    options = [*quick, "log.every_n_steps=50", "train.schedule.name=constant"]
    fit("digits-resnet", [*options, "train.epochs=2"], output=tmp_path / "run")
    path = tmp_path / "run/metrics.csv"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("step,epoch,")
    assert [line.split(",")[:2] for line in lines[1:]] == [["2", "0"], ["5", "1"]]
    path.write_text("\n".join(lines[:-1]) + "\n5,")  # the row of the last epoch, cut
    fit("digits-resnet", [*options, "train.epochs=3"], resume=tmp_path / "run")
    again = path.read_text().splitlines()
    untested = [{key: value for key, value in row.items() if "test/" not in key} for row in csv.DictReader(lines)]
    for row, expected in zip(csv.DictReader(again), untested, strict=False):
        assert row.items() >= expected.items()  # from the checkpoint
    assert [line.split(",")[:2] for line in again[len(lines) :]] == [["8", "2"]]


def test_tensorboard_has_no_point_twice_after_a_kill(tmp_path: Path, quick: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("digits-resnet", quick, output=tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    first = checkpoint.read_bytes()
    options = [*quick, "train.schedule.name=constant"]
    fit("digits-resnet", [*options, "train.epochs=3"], resume=tmp_path / "run")
    checkpoint.write_bytes(first)  # as if the run had been killed before the third epoch's checkpoint
    fit("digits-resnet", [*options, "train.epochs=3"], resume=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 5, 8]
    assert [event.step for event in events.Scalars("temperature")] == list(range(9))
