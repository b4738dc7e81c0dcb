"""RandAugment in timm's words, with timm and without, and random erasing by pixels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kw_lightning.fit.data.augmentation
import kw_lightning.rand_augment
from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit.data.augmentation import RandAugment, TimmRandAugment, rand_augment, random_erasing
from kw_lightning.fit.data.transforms import transform
from kw_lightning.planning import plan
from kw_lightning.planning.table import total_lines
from kw_lightning.rand_augment import TimmWords, difference

WORDS = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def seeded(step: Any, image: Any, seed: int) -> np.ndarray[Any, Any]:
    random.seed(seed)
    np.random.seed(seed)
    return np.asarray(step(image))


def test_it_is_that_of_timms_create_transform(picture: Image.Image) -> None:
    timm = pytest.importorskip("timm")
    whole = timm.data.create_transform(
        64, is_training=True, auto_augment=WORDS, interpolation="bicubic", mean=MEAN, re_prob=0.25, re_mode="pixel"
    )
    assert not any("Jitter" in type(step).__name__ for step in whole.transforms)  # none beside RandAugment
    (theirs,) = (step for step in whole.transforms if type(step).__name__ == "RandAugment")
    ours = rand_augment({"rand_augment": WORDS, "interpolation": "bicubic", "mean": list(MEAN)})
    assert isinstance(ours, TimmRandAugment)
    changed = 0
    for seed in range(100):
        found = seeded(ours, picture, seed)
        try:
            expected = seeded(theirs, picture, seed)
        except ValueError:  # newer versions of Pillow refuse to keep no bit
            continue
        assert np.array_equal(found, expected)
        changed += not np.array_equal(expected, np.asarray(picture))
    assert changed > 50


def test_posterizing_to_no_bit_gives_black(picture: Image.Image) -> None:
    pytest.importorskip("timm")
    step = TimmRandAugment("rand-m10-n9-p1-inc1", MEAN, "bilinear")
    black = sum(not seeded(step, picture, seed).any() for seed in range(40))
    assert black > 0


def test_tensors_and_grey_images_go_through_timm_too() -> None:
    pytest.importorskip("timm")
    step = TimmRandAugment(WORDS, MEAN, "bilinear")
    for channels in (1, 3):
        image = torch.randint(0, 256, (channels, 28, 28), dtype=torch.uint8)
        for seed in range(30):
            found = seeded(step, image, seed)
            assert (found.shape, found.dtype) == ((channels, 28, 28), np.uint8)


def test_without_timm_it_is_torchvisions_and_the_plan_says_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("resnet18-kw-1x-imagenet")
    with_timm = total_lines(plan(recipe))
    monkeypatch.setattr(kw_lightning.rand_augment, "has_timm", lambda: False)
    monkeypatch.setattr(kw_lightning.fit.data.augmentation, "has_timm", lambda: False)
    (line,) = (line for line in total_lines(plan(recipe)) if line.startswith("RandAugment"))
    assert "by torchvision, since timm is not installed: strength 27 of 30, spread 1.5;" in line
    pytest.importorskip("timm")
    assert "RandAugment       rand-m9-mstd0.5-inc1, by timm" in with_timm
    step = rand_augment({"rand_augment": WORDS})
    assert isinstance(step, RandAugment)
    assert (step.operations, step.mean_magnitude, step.std, step.probability) == (2, 27, 1.5, 0.5)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(0)
    untouched = sum(torch.equal(step(image), image) for _ in range(200))
    assert 25 < untouched < 100  # a quarter of the images draws no operation, and some operations change nothing


@pytest.mark.parametrize(("words", "cut"), [("rand-m10", False), ("rand-m15", True), ("rand-m15-mmax30", False)])
def test_strength_that_timm_cuts_is_told_by_the_plan(words: str, cut: bool) -> None:
    pytest.importorskip("timm")
    told = difference(load_recipe({"kw": 1, "data": {"name": "digits", "train": {"rand_augment": words}}}))
    assert told == f"{words}, by timm" + (", as m10: more needs a larger mmax, as -mmax30" if cut else "")


def test_words_are_read() -> None:
    assert TimmWords.read("rand-n3-p0.7-mstd1.5-m7-inc0") == TimmWords(7, 1.5, 3, 0.7)
    assert TimmWords.read("rand") == TimmWords()


@pytest.mark.parametrize("words", ["rand-m9-tweights", "rand-x1", "augmix-m5", "rand-m9-mstd"])
def test_other_words_are_refused(words: str) -> None:
    with pytest.raises(RecipeError, match=r"allowed: none, timm's words such as rand-m9-mstd0\.5-inc1 or a map"):
        load_recipe({"kw": 1, "data": {"name": "digits", "train": {"rand_augment": words}}})


@pytest.mark.parametrize("mode", ["zero", "pixel"])
def test_erased_rectangles_are_zero_or_noise_for_each_pixel(mode: str) -> None:
    torch.manual_seed(0)
    step = random_erasing({"random_erasing": {"probability": 1, "mode": mode}})
    assert step is not None
    image = torch.full((3, 64, 64), 7.0)
    erased = [found for found in (step(image) for _ in range(50)) if not torch.equal(found, image)]
    values = torch.cat([found[found != 7] for found in erased])
    assert len(erased) == 50
    if mode == "zero":
        assert torch.all(values == 0)
    else:
        assert (values.mean().abs(), (values.std() - 1).abs()) < (0.02, 0.02)
        assert len(values.unique()) > 0.9 * len(values)


def test_a_number_alone_is_the_probability_and_none_is_no_step() -> None:
    assert random_erasing({"random_erasing": 0.5}).p == 0.5  # type: ignore[union-attr]
    assert random_erasing({}) is random_erasing({"random_erasing": {"probability": 0}}) is None
    assert rand_augment({"rand_augment": "none"}) is None


def test_the_published_training_image_comes_out_whole(picture: Image.Image) -> None:
    image = transform(load_recipe("resnet18-kw-1x-imagenet"), "train")(picture.resize((300, 260)))
    assert (image.shape, image.dtype) == ((3, 224, 224), torch.float32)
    assert torch.isfinite(image).all()
