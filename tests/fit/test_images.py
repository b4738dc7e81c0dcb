"""Image files of every kind of number, and damaged ones: read to scale, or refused by name in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kw_lightning import load_recipe
from kw_lightning.errors import RunError
from kw_lightning.fit import fit
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.failures import readable_failures

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, name: str) -> None:
    if name == "a.pgm":  # which Pillow writes from version 11 on
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + (RAMP * 257).byteswap().tobytes())
    else:
        Image.fromarray(RAMP * 257).save(tmp_path / name)
    image = read_image(str(tmp_path / name))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_as_pil_shows_them(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(np.asarray(read_image(str(path))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused_by_name(tmp_path: Path, kind: type) -> None:
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "deep.tif")
    with pytest.raises(RunError, match=r"deep\.tif: an image of 32-bit numbers"):
        read_image(str(tmp_path / "deep.tif"))


def test_damaged_images_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    for name, damaged in {"cut.png": content[:2000], "text.png": b"no image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(RunError, match=name) as caught:
            read_image(str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(RunError, match=r"gone\.png: the image cannot be read: No such file"):
        read_image(str(tmp_path / "gone.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(RunError, match=r"whole\.png: the image cannot be read: Image size \(1600 pixels\) exceeds"):
        read_image(str(whole))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of four 8×8 pictures in both parts."""
    for part in ("train", "val"):
        for name, value in (("cat", 60), ("dog", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (value, value, number)).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def options(root: Path, **data: Any) -> dict[str, Any]:
    return {
        "kw": 1,
        "model": {"input": [3, 8, 8], "layers": [{"Flatten": {}}, {"Dense": {"units": 2}}]},
        "data": {"name": "image_folder", "root": str(root), "batch_size": 4, "train": {}, "eval": {}, **data},
        "train": {"epochs": 1},
        "log": {"tensorboard": False, "report": False},
    }


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damaged", ["train/dog/2.png", "val/cat/0.png", "val/dog/3.png"])
def test_a_damaged_image_ends_a_run_in_one_line_that_names_it(pictures: Path, workers: int, damaged: str) -> None:
    (pictures / damaged).write_bytes(b"no image")
    with pytest.raises(RunError) as caught:
        fit(load_recipe(options(pictures, workers=workers)), output=pictures / "run")
    assert str(caught.value) == f"{pictures / damaged}: not an image of a known format, or a damaged one"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_damaged_images_alone_are_left_out(pictures: Path, workers: int) -> None:
    for part, count in (("train", 3), ("val", 4)):
        for number in range(count):
            (pictures / part / "dog" / f"{number}.png").write_bytes(b"no image")
    recipe = load_recipe(options(pictures, workers=workers, broken="skip", batch_size=2))
    data = data_module(recipe)
    assert isinstance(data, ImageData)
    for epoch in range(4):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        sizes = [len(images) for images, _ in loader]
        assert len(sizes) == 4  # no step is missing
        assert min(sizes) >= 1
    assert [targets.tolist() for _, targets in data.val_dataloader()] == [[0, 0], [0, 0]]
    assert fit(recipe, output=pictures / "run").best["accuracy"] >= 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_part_of_damaged_images_alone_is_one_line(pictures: Path, workers: int) -> None:
    for image in pictures.glob("*/*/*.png"):
        image.write_bytes(b"no image")
    data = data_module(load_recipe(options(pictures, workers=workers, broken="skip", batch_size=2)))
    assert isinstance(data, ImageData)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(RunError, match=r"^data: no image can be read$"):
            list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_size_name_the_key_that_helps(pictures: Path, workers: int) -> None:
    Image.new("RGB", (9, 8)).save(pictures / "val/dog/3.png")
    data = data_module(load_recipe({**options(pictures, workers=workers), "model": {"input": [3, 8]}}))
    assert isinstance(data, ImageData)
    with pytest.raises(
        RunError, match=r"8×8 \(.*0\.png\) and 8×9 \(.*3\.png\); give them one by data\.eval\.size"
    ) as e:
        list(data.val_dataloader())
    assert len(str(e.value).splitlines()) == 1


KILLED = """
import os, signal, sys
from kw_lightning import load_recipe
from kw_lightning.errors import RunError
from kw_lightning.fit.data import data_module
from kw_lightning.fit.failures import readable_failures
recipe = {"kw": 1, "model": {"input": [3, 8, 8]}}
data = data_module(load_recipe({**recipe, "data": {"name": "image_folder", "root": sys.argv[1], "workers": 1}}))
data.parts["train"].samples.loader = lambda path: os.kill(os.getpid(), signal.SIGKILL)
try:
    with readable_failures():
        list(data.train_dataloader())
except RunError as error:
    print(error)
"""


def test_a_worker_that_is_killed_is_one_line(pictures: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(pictures)], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("a process that reads images was ended from outside")


def test_memory_that_is_too_small_is_one_line() -> None:
    with pytest.raises(RunError, match=r"the computer's memory is too small.*data\.batch_size"), readable_failures():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RunError, match=r"the computer's memory is too small"), readable_failures():
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), readable_failures():
        raise RuntimeError("something else")
