"""Transforms of whole batches: the same as of single images where nothing is random, the same in kind where it is."""

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from kw_lightning import load_recipe
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.batches import BATCHED, batchwise
from kw_lightning.fit.data.draws import Draws
from kw_lightning.fit.data.transforms import Shift

ALL = {"crop": "random", "size": 8, "padding": 2, "flip": True, "shift": 1, "noise": 0.1, "random_erasing": 0.5}


def images(count: int = 2000, size: int = 12) -> Tensor:
    return torch.randint(1, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def apply(step: Any, batch: Tensor, seed: int = 0) -> Tensor:
    (function,) = batchwise(v2.Compose([step]))
    return function(batch, Draws(seed, 0, list(range(len(batch)))), 0)


def test_images_draw_by_seed_epoch_and_index_alone() -> None:
    whole = Draws(3, 1, [5, 6, 7])
    assert torch.equal(whole.uniform(0, 4)[1:], Draws(3, 1, [6, 7]).uniform(0, 4))
    assert torch.equal(whole.normal(2, (3, 3))[2], Draws(3, 1, [7]).normal(2, (3, 3))[0])
    different = [Draws(4, 1, [5]), Draws(3, 2, [5]), Draws(3, 1, [6])]
    assert len({float(draws.uniform(0, 1)) for draws in [Draws(3, 1, [5]), *different]}) == 4
    assert not torch.equal(whole.uniform(0, 4), whole.uniform(1, 4))
    many = Draws(0, 0, range(20_000)).uniform(0, 2)
    assert many.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert abs(float(torch.corrcoef(many.T)[0, 1])) < 0.03


def test_half_of_the_images_are_flipped() -> None:
    batch = images()
    flipped = apply(v2.RandomHorizontalFlip(), batch)
    same = (flipped == batch).flatten(1).all(dim=1)
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(dim=1)
    assert bool((same ^ mirrored).all())
    assert 0.46 < float(mirrored.float().mean()) < 0.54


@pytest.mark.parametrize(("size", "padding"), [(8, None), (8, 2), (12, 3), (14, None), (15, 1)])
def test_random_crops_are_windows_at_every_place_equally_often(size: int, padding: int | None) -> None:
    batch = images()
    step = v2.RandomCrop(size, padding=padding, pad_if_needed=True)
    cropped = apply(step, batch)
    assert cropped.shape == (len(batch), 1, size, size)
    margin = (padding or 0) + max(size - 12 - 2 * (padding or 0), 0)
    around = v2.functional.pad(batch, [margin] * 4)
    room = around.shape[-1] - size + 1
    counts = torch.zeros(room, room)
    for row in range(room):
        for column in range(room):
            window = around[..., row : row + size, column : column + size]
            counts[row, column] = (window == cropped).flatten(1).all(dim=1).sum()
    assert int(counts.sum()) == len(batch)
    assert float(counts.min()) > len(batch) / room**2 * 0.4


def test_shifts_are_whole_pixels_with_zeros_at_the_border() -> None:
    batch = torch.zeros(500, 1, 7, 7, dtype=torch.uint8)
    batch[:, 0, 3, 3] = 200
    moved = apply(Shift(1), batch)
    assert moved.flatten(1).sum(dim=1).tolist() == [200] * 500
    places = {tuple(place) for place in moved.nonzero()[:, 2:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (2, 3, 4)}


def test_erased_rectangles_are_as_torchvision_draws_them() -> None:
    batch = torch.ones(1500, 1, 20, 20)
    erased = apply(v2.RandomErasing(0.5), batch)
    torch.manual_seed(0)
    one_by_one = torch.stack([v2.RandomErasing(0.5)(image) for image in batch])
    for found in (erased, one_by_one):
        for image in found[found.flatten(1).amin(dim=1) == 0][:50, 0]:
            rows, columns = (image == 0).any(dim=1), (image == 0).any(dim=0)
            assert int((image == 0).sum()) == int(rows.sum()) * int(columns.sum())  # a rectangle
    shares = [float((found == 0).float().mean()) for found in (erased, one_by_one)]
    touched = [float((found.flatten(1).amin(dim=1) == 0).float().mean()) for found in (erased, one_by_one)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert touched[0] == pytest.approx(touched[1], abs=0.05)
    middle = [(found == 0).float().mean(dim=(0, 1)) for found in (erased, one_by_one)]
    assert float((middle[0] - middle[1]).abs().max()) < 0.05


def test_noise_has_the_spread_asked_for() -> None:
    noisy = apply(v2.GaussianNoise(sigma=0.3, clip=False), torch.full((200, 1, 8, 8), 0.5))
    assert float(noisy.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noisy.std()) == pytest.approx(0.3, abs=0.01)


def test_what_has_no_form_for_batches_is_drawn_for_each_image() -> None:
    step = v2.RandomResizedCrop(6)
    assert type(step) not in BATCHED
    batch = images(8)[:1].expand(8, -1, -1, -1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cropped = apply(step, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(image.flatten().tolist()) for image in cropped}) > 5  # two whole images may be alike
    assert torch.equal(apply(step, batch), cropped)


def training_loader(train: dict[str, Any], workers: int = 0, **data: Any) -> Any:
    recipe = load_recipe(
        {
            "kw": 1,
            "model": {"input": [1, 8, 8]},
            "data": {"name": "digits", "workers": workers, "batch_size": 16, "train": {"samples": 60, **train}, **data},
        }
    )
    module = data_module(recipe)
    assert isinstance(module, ImageData)
    return module.train_dataloader()


def read(train: dict[str, Any], workers: int = 0, epochs: int = 1, skip: int = 0, **data: Any) -> list[Tensor]:
    loader = training_loader(train, workers, **data)
    batches = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        if skip and epoch == epochs - 1:
            state = {"batches": skip, "generator": loader.generator.get_state(), "epoch": epoch}
            loader.load_state_dict(state)
        batches = [batch for batch, _ in loader]
    return batches


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "train", [ALL, {"crop": "random_resized", "size": 8, "rand_augment": {"magnitude": 9, "std": 2}}]
)
def test_augmentation_is_the_same_with_any_number_of_workers(train: dict[str, Any]) -> None:
    alone = read(train, epochs=2)
    torch.rand(7)
    assert same(alone, read(train, workers=2, epochs=2))
    assert not same(alone, read(train, epochs=1))


@pytest.mark.parametrize(("train", "data"), [({}, {}), (ALL, {}), ({}, {"sampling": "balanced"})])
def test_a_worker_that_is_not_forked_gets_the_same_data(train: dict[str, Any], data: dict[str, Any]) -> None:
    loader = training_loader(train, **data)
    there, _ = pickle.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn)))
    assert torch.equal(there.__getitems__([3, 5, 8])[0], loader.dataset.__getitems__([3, 5, 8])[0])


def test_the_rest_of_an_epoch_has_the_augmentation_of_the_whole_one() -> None:
    whole = read(ALL, epochs=2)
    assert same(read(ALL, epochs=2, skip=2), whole[2:])
    assert same(read(ALL, epochs=2, skip=2, workers=1), whole[2:])


def test_a_batch_without_random_steps_is_what_its_images_are_alone() -> None:
    recipe = load_recipe(
        {
            "kw": 1,
            "model": {"input": [1, 8, 8]},
            "data": {
                "name": "digits",
                "eval": {"resize": 11, "crop": "center", "size": 9, "mean": [0.5], "std": [0.2]},
            },
        }
    )
    data = data_module(recipe)
    assert isinstance(data, ImageData)
    batch, targets = data.parts["test"].__getitems__([3, 5, 8])  # type: ignore[misc]
    for position, index in enumerate([3, 5, 8]):
        image, target = data.parts["test"].samples[index]
        assert torch.equal(batch[position], data.parts["test"].steps(image))
        assert targets[position] == target
