"""Predictions: of every kind of input, and the same whatever runs beside an image."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kw_lightning.inference import ImageClassifier, Prediction, find_images
from kw_lightning.preprocessing import Preprocessing


def scores(predictions: list[Prediction]) -> dict[str | None, dict[str, float]]:
    return {prediction.path: dict(prediction.top) for prediction in predictions}


def test_one_image_gives_one_prediction(classifier: ImageClassifier, pictures: Path) -> None:
    found = classifier.predict(pictures / "0.png", top=3)
    assert found.path == str(pictures / "0.png")
    assert len(found.top) == 3
    assert found.top[0] == (found.label, found.score)
    assert found.score >= found.top[1][1] >= found.top[2][1] > 0


def test_scores_of_all_classes_sum_to_one(classifier: ImageClassifier, pictures: Path) -> None:
    found = classifier.predict(pictures / "0.png", top=100)
    assert {label for label, _ in found.top} == set(classifier.classes)
    assert sum(score for _, score in found.top) == pytest.approx(1, abs=1e-6)


def test_path_picture_and_tensor_of_one_image_agree(classifier: ImageClassifier, pictures: Path) -> None:
    path = pictures / "3.png"
    picture = Image.open(path)
    by_path, by_picture = classifier.predict([path, picture], top=10)
    assert dict(by_path.top) == pytest.approx(dict(by_picture.top), abs=1e-6)
    tensor = torch.randint(0, 256, (3, 18, 18), dtype=torch.uint8)  # scaled, bytes would be rounded anew
    bytes_, floats = classifier.predict([tensor, tensor / 255], top=10)
    assert dict(bytes_.top) == pytest.approx(dict(floats.top), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_batch_size_order_and_workers_change_nothing(
    classifier: ImageClassifier, pictures: Path, batch_size: int, workers: int
) -> None:
    files = find_images([pictures])
    expected = scores([classifier.predict(file, top=10) for file in files])
    random.Random(batch_size).shuffle(files)
    found = classifier.predict(files, top=10, batch_size=batch_size, workers=workers)
    assert [prediction.path for prediction in found] == [str(file) for file in files]
    for path, values in scores(found).items():
        assert values == pytest.approx(expected[path], abs=1e-6)


def test_unreadable_images_are_told_and_hurt_no_others(classifier: ImageClassifier, pictures: Path) -> None:
    whole = (pictures / "4.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    good, cut, text, missing = classifier.predict(
        [pictures / "4.png", pictures / "cut.png", pictures / "notes.txt", pictures / "nope.png"]
    )
    assert good.problem is None
    assert good.label in classifier.classes
    for bad in (cut, text, missing):
        assert bad.label is None
        assert bad.problem
        assert "\n" not in bad.problem


def test_an_answer_that_is_no_number_is_told(classifier: ImageClassifier, pictures: Path) -> None:
    good, bad = classifier.predict([pictures / "4.png", torch.full((3, 16, 16), torch.nan)])
    assert good.label in classifier.classes
    assert (bad.label, bad.problem) == (None, "the network's answer is infinite or not a number")


def test_an_image_that_the_network_does_not_take_is_told_and_hurts_no_others(
    classifier: ImageClassifier, pictures: Path
) -> None:
    own_size = replace(classifier.saved, preprocessing=Preprocessing(channels=3))
    good, small = ImageClassifier(own_size).predict([pictures / "4.png", torch.zeros(3, 4, 4)])
    assert good.label in classifier.classes
    assert small.label is None
    assert str(small.problem).startswith("the network does not take an image of [3, 4, 4]: ")
    unknown = replace(classifier.saved, preprocessing=Preprocessing())
    other = ImageClassifier(unknown).predict(torch.zeros(5, 18, 18))
    assert str(other.problem).startswith("the network does not take an image of [5, 18, 18]: ")
    assert str(other.problem).endswith("; give model.input in its recipe")


ARRAY = np.zeros((16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (ARRAY, TypeError, r"an object of ndarray in the place of an image, .*; PIL\.Image\.fromarray\(array\) makes"),
        ([ARRAY], TypeError, "an object of ndarray"),
        (None, TypeError, "an object of NoneType in the place of an image, allowed: a path, .*or a list of such$"),
        (b"0.png", TypeError, "an object of bytes"),
        ({"0.png"}, TypeError, "an object of set"),
        (torch.zeros(2, 3, 16, 16), ValueError, r"\[2, 3, 16, 16\], allowed: \[3, height, width\]; .*list\(images\)$"),
        (torch.zeros(16, 16), ValueError, r"of the shape \[16, 16\], allowed: \[3, height, width\]$"),
        ([torch.zeros(1, 16, 16)], ValueError, r"of the shape \[1, 16, 16\], allowed: \[3, height, width\]$"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), TypeError, r"torch\.int64, allowed: torch\.uint8, or floating"),
    ],
)
def test_what_is_no_image_is_refused(
    classifier: ImageClassifier, images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        classifier.predict(images)


def test_a_top_of_nothing_is_refused(classifier: ImageClassifier, pictures: Path) -> None:
    with pytest.raises(ValueError, match="found top 0, allowed: a number of at least 1"):
        classifier.predict(pictures / "0.png", top=0)


def test_a_network_in_training_mode_predicts_in_evaluation_mode_and_stays_in_its_own(
    classifier: ImageClassifier, pictures: Path
) -> None:
    expected = classifier.predict(pictures / "1.png", top=10)
    classifier.train()
    try:
        found = classifier.predict(pictures / "1.png", top=10)
        assert all(module.training for module in classifier.network.modules())
    finally:
        classifier.eval()
    assert dict(found.top) == pytest.approx(dict(expected.top), abs=1e-6)


def test_several_classes_an_image_have_scores_of_their_own(classifier: ImageClassifier, pictures: Path) -> None:
    from dataclasses import replace

    several = ImageClassifier(replace(classifier.saved, several=True))
    found = several.predict(pictures / "0.png", top=10)
    image = several.saved.preprocessing
    assert image.channels == 3
    assert sum(score for _, score in found.top) != pytest.approx(1, abs=1e-3)
