"""The example with WebDataset's shards: every image once an epoch, and a resume at the very next one."""

import io
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kw_lightning.errors import RunError
from kw_lightning.fit import Classifier, evaluate, fit

pytest.importorskip("webdataset")
EXAMPLES = Path(__file__).parents[2] / "recipes" / "examples"
COUNTS = (7, 5, 6, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four shards to train, of 21 images together, and one to validate."""
    folder = tmp_path_factory.mktemp("shards")
    for name, counts in (("train", COUNTS), ("val", (4,))):
        for shard, count in enumerate(counts):
            with tarfile.open(folder / f"{name}-{shard:03}.tar", "w") as archive:
                for number in range(count):
                    add(archive, f"{shard}{number}.png", picture(shard, number))
                    add(archive, f"{shard}{number}.cls", str(number % 2).encode())
    return folder


def picture(shard: int, number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * shard, 30 * number, 9)).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import shards

    return shards


def data_of(shards: Any, root: Path, **options: Any) -> Any:
    return shards.Shards(str(root), ["even", "odd"], size=8, batch_size=2, **options)


def colours(batches: Any) -> list[tuple[int, ...]]:
    return [tuple((image[:, 0, 0] * 1000).round().int().tolist()) for images, _ in batches for image in images]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_has_every_image_once_and_goes_on_at_the_next_one(shards: Any, root: Path, workers: int) -> None:
    whole = data_of(shards, root, workers=workers).train_dataloader()
    epochs = [list(whole), list(whole)]
    seen = [colours(epoch) for epoch in epochs]
    assert len(set(seen[0])) == sum(COUNTS) == len(seen[0])
    assert seen[0] != seen[1]
    assert set(seen[0]) == set(seen[1])
    assert len(epochs[0]) == len(data_of(shards, root, workers=workers).train_dataloader())
    for stop in (1, len(epochs[0]) - 1, len(epochs[0])) if not workers else (4,):
        broken = data_of(shards, root, workers=workers).train_dataloader()
        batches = iter(broken)
        before = [next(batches) for _ in range(stop)]
        fresh = data_of(shards, root, workers=workers).train_dataloader()
        fresh.load_state_dict(broken.state_dict())
        rest = list(fresh) if stop < len(epochs[0]) else []
        for (images, targets), (expected, numbers) in zip([*before, *rest], epochs[0], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(targets, numbers)
        assert colours(fresh) == seen[1]


def test_a_run_on_shards_that_is_stopped_inside_an_epoch_goes_on_to_the_bit(
    shards: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "kw": 1,
        "name": "shards",
        "model": {"input": [3, 8, 8], "layers": ["Flatten", {"Dense": {"units": "auto"}}]},
        "data": {
            "name": "python:shards:Shards",
            "args": {"root": str(root), "classes": ["even", "odd"], "size": 8, "batch_size": 2},
        },
        "train": {"epochs": 2, "accelerator": "cpu"},
        "log": {"tensorboard": False, "report": False},
    }
    unbroken = fit(recipe, output=tmp_path / "unbroken", allow_python=["shards"])
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, output=tmp_path / "broken", allow_python=["shards"])
    resumed = fit(recipe, output=tmp_path / "broken", resume=tmp_path / "broken", allow_python=["shards"])
    for key, value in unbroken.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[key], value), key
    assert resumed.last == unbroken.last
    assert evaluate(tmp_path / "broken", allow_python=["shards"]).metrics == unbroken.best
    assert "shards" in sys.modules


def test_what_a_shard_lacks_is_said_by_name(shards: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no shards called train-\*\.tar"):
        data_of(shards, tmp_path)
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        add(archive, "cat.cls", b"0")
        add(archive, "cat.pyd", b"cos\nsystem\n(S'false'\ntR.")  # never unpickled
    with pytest.raises(RunError, match=r"train-0\.tar: cat: an image .* and the number of its class"):
        list(data_of(shards, tmp_path).train_dataloader())
