"""Predictions: of every kind of input, and the same whatever runs beside an image."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from kw_lightning.inference import ImageClassifier, Prediction, find_images


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
