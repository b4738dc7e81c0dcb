"""Balanced sampling: all classes equally often, whatever process or worker reads, and exact where a run goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.data.sampling import BalancedPlaces
from kw_lightning.fit.data.sets import Images, even_subset, targets_of
from kw_lightning.fit.data.transformed import Transformed
from kw_lightning.fit.data.transforms import transform
from kw_lightning.fit.module import Classifier

unequal = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)


def unequal_images(seed: int = 0, noise: float = 0.0) -> Transformed:
    """A thousand images in which their number is written, of three classes of 900, 90 and 10."""
    recipe = load_recipe({"kw": 1, "data": {"name": "fake", "train": {"mean": [0], "std": [1], "noise": noise}}})
    numbers = torch.arange(1000)
    written = torch.stack([numbers // 250, numbers % 250], dim=1).to(torch.uint8)[:, None, None, :]
    images = Transformed(Images(written, unequal), transform(recipe, "train"), seed, "data.train.size")
    images.places = BalancedPlaces(unequal, seed)
    return images


def numbers_of(images: torch.Tensor) -> list[int]:
    values = (images * 255).round().long()[:, 0, 0]
    return (values[:, 0] * 250 + values[:, 1]).tolist()


def test_classes_come_equally_often_and_images_of_a_class_too() -> None:
    images = unequal_images()
    drawn = torch.zeros(1000)
    for epoch in range(20):
        images.epoch.fill_(epoch)
        read, classes = images.read(list(range(1000)))
        assert torch.equal(classes, unequal[numbers_of(read)])  # an image keeps its own class
        drawn += torch.bincount(torch.tensor(numbers_of(read)), minlength=1000)
    shares = [float(drawn[unequal == number].sum()) / 20_000 for number in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.015)  # four and a half standard deviations
    assert drawn[unequal == 2].tolist() == pytest.approx([20_000 / 30] * 10, rel=0.2)


def test_an_epoch_follows_from_seed_and_epoch_alone() -> None:
    places = BalancedPlaces(unequal, 3)
    first = places.at(0, range(1000))
    assert places.at(1, range(1000)) != first
    assert BalancedPlaces(unequal, 4).at(0, range(1000)) != first
    torch.manual_seed(5)
    assert BalancedPlaces(unequal, 3).at(0, [7, 3]) == [first[7], first[3]]
    images, parts = unequal_images(3), []
    for rank in range(2):  # what Lightning puts in the place of the order where there are several processes
        sampler = DistributedSampler(images, num_replicas=2, rank=rank, seed=3)
        parts += numbers_of(images.read(list(sampler))[0])
    assert sorted(parts) == sorted(first)


def test_an_image_that_comes_twice_is_augmented_in_two_ways() -> None:
    images = unequal_images(noise=0.1)
    drawn = images.places.at(0, range(1000))  # type: ignore[union-attr]
    twice = [place for place in range(1000) if drawn[place] == 995][:2]
    first, second = images.read(twice)[0]
    assert not torch.equal(first, second)
    assert torch.allclose(first, second, atol=0.9)


def test_targets_of_a_subset_are_known_without_reading() -> None:
    samples = Images(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), [0, 0, 0, 0, 1, 1, 2, 2])
    assert targets_of(even_subset(samples, 4)).tolist() == [0, 0, 1, 2]


def test_data_of_ones_own_chooses_its_images_itself() -> None:
    with pytest.raises(RecipeError, match=r"^data\.sampling: found balanced with data of one's own, allowed: each"):
        load_recipe({"kw": 1, "data": {"name": "python:team:data", "sampling": "balanced"}})
    recipe = load_recipe({"kw": 1, "data": {"name": "digits", "sampling": "balanced", "train": {"samples": 60}}})
    assert ImageData(recipe).parts["train"].places is not None


def test_a_balanced_run_goes_on_to_the_bit(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*quick, "log.tensorboard=false", "data.train.noise=0.1", "data.sampling=balanced"]
    unbroken = fit("digits-resnet", options, output=tmp_path / "unbroken")
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("digits-resnet", options, output=tmp_path / "broken")
    resumed = fit("digits-resnet", [*options, "data.workers=1"], resume=tmp_path / "broken")
    ends = (torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True) for run in (unbroken, resumed))
    first, second = (state["state_dict"] for state in ends)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
