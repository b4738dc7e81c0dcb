"""Files are written whole or not at all, and what keeps them from it is one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kw_lightning.builder import build
from kw_lightning.cli import application
from kw_lightning.errors import RunError
from kw_lightning.export import write_program
from kw_lightning.inference import ImageClassifier, Prediction, SavedNetwork, write_predictions
from kw_lightning.paths import partial_of, whole, writable
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    with whole(tmp_path / "a.txt") as place:
        place.write_text("new")
        place.with_suffix(".json").write_text("beside")
        assert not (tmp_path / "a.txt").exists()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "new", "a.json": "beside"}


def test_what_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    def fail(file: Path) -> None:
        with whole(file) as place:
            place.write_text("half")
            raise ValueError("half way")

    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(ValueError, match="half way"):
        fail(tmp_path / "a.txt")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "before"}


@pytest.mark.parametrize("leave", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_what_a_kill_left_is_removed(tmp_path: Path, leave: Callable[[Path], None]) -> None:
    leave(partial_of(tmp_path / "a.txt"))
    with whole(tmp_path / "a.txt") as place:
        place.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_only_its_owner_reads_stays_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch(0o600)
    with whole(tmp_path / "a.txt") as place:
        place.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "b.txt").write_text("before")
    (tmp_path / "a.txt").symlink_to(tmp_path / "there" / "b.txt")
    with whole(tmp_path / "a.txt") as place:
        place.write_text("new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "there" / "b.txt").read_text() == "new"


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with whole(tmp_path / "pipe") as place:
        place.write_text("new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("name", "reason"), [("no/a.txt", "No such file or directory"), ("folder", "Is a directory")])
def test_where_no_file_can_be_is_one_line(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=f"{tmp_path}/{name} cannot be written: {reason}"), writable(tmp_path / name):
        pass
    with pytest.raises(OSError, match=f"{reason}: '{tmp_path}/{name}'"), whole(tmp_path / name):
        pass


@contextmanager
def no_room(size: int = 1000) -> Iterator[None]:
    """As if the disk had no room for files of more bytes."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def saved() -> SavedNetwork:
    layers = [{"Conv2D": {"filters": 8, "kernel_size": 3, "warehouse": "all"}}, {"GlobalAveragePooling2D": {}}]
    recipe = load_recipe(
        {"kw": 1, "name": "small", "model": {"input": [3, 12, 12], "layers": layers}, "warehouses": {"all": {}}}
    )
    steps = Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 12, None, "none", "bilinear", "a test", channels=3)
    return SavedNetwork(build(recipe).eval(), recipe, steps, tuple("abcdefgh"))


WRITERS: dict[str, Callable[[SavedNetwork, Path], object]] = {
    "network.pt2": write_program,
    "network": lambda saved, path: ImageClassifier(saved).save_pretrained(path),
    "small": lambda saved, path: ImageClassifier(saved).save_pretrained(path, eight_bits=True),
    "table.csv": lambda _, path: write_predictions([Prediction((("cat", 0.5),), "a.png")] * 100, path, 1),
    "table.json": lambda _, path: write_predictions([Prediction((("cat", 0.5),), "a.png")] * 100, path, 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, saved: SavedNetwork, name: str) -> None:
    with no_room(), pytest.raises(RunError, match=f"{name} cannot be written: .*[Ff]ile too large"):
        WRITERS[name](saved, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    WRITERS[name](saved, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "arguments",
    [("new", "mine", "--from", "torchvision/resnet18", "--output"), ("lock", "digits-resnet", "--output")],
    ids=["new", "lock"],
)
def test_a_full_disk_leaves_no_recipe(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with no_room():
        done = CliRunner().invoke(application(), [*arguments, str(tmp_path / "mine.yaml")])
    assert (done.exit_code, done.output) == (1, f"{tmp_path}/mine.yaml cannot be written: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_before_is_read_after_a_full_disk(tmp_path: Path, saved: SavedNetwork) -> None:
    ImageClassifier(saved).save_pretrained(tmp_path / "network")
    images = torch.randn(2, 3, 12, 12)
    before = ImageClassifier.from_pretrained(tmp_path / "network")(images)
    other = SavedNetwork(nn.Sequential(saved.network), saved.recipe, saved.preprocessing, saved.classes)
    with no_room(), pytest.raises(RunError):
        ImageClassifier(other).save_pretrained(tmp_path / "network")
    assert torch.equal(ImageClassifier.from_pretrained(tmp_path / "network")(images), before)
