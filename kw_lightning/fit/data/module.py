"""The data module: a data set by name, its transforms, its loaders, and mixup and CutMix over whole batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from kw_lightning.backbones import import_callable
from kw_lightning.callbacks.resume import ResumableDataLoader
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit.data.batches import batchwise
from kw_lightning.fit.data.division import divided
from kw_lightning.fit.data.draws import Draws, own_random_numbers, seed_everywhere
from kw_lightning.fit.data.sampling import BalancedPlaces
from kw_lightning.fit.data.sets import Images, Samples, channels, even_subset, file_of, open_source, targets_of, whole
from kw_lightning.fit.data.splitting import Split
from kw_lightning.fit.data.transforms import transform
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe.types import Recipe

log = logging.getLogger(__name__)

NONE_READ = "data: no image can be read"

Batch = tuple[Tensor, Tensor]
"""Images [b, c, h, w] and classes [b]; with mixup or several labels the classes' shares [b, classes]."""


def data_module(
    recipe: Recipe,
    *,
    allow_python: Sequence[str] = (),
    trained: Preprocessing | None = None,
    classes: Sequence[str] = (),
    split: Split | None = None,
) -> LightningDataModule:
    """Return the data module of a recipe.

    Args:
        recipe: the recipe.
        allow_python: packages whose code the recipe may name.
        trained: what the network of a checkpoint was evaluated with; the recipe's own without it.
        classes: of a network that is only evaluated, in its order: no training images are needed then.
        split: the training images that validate in a run that is gone on from; drawn without it.

    Raises:
        RecipeError: the recipe names no data, **or** data, arguments or a Python package that cannot be used.
        RunError: the data is not there.
    """
    if recipe.data is None:
        raise RecipeError(
            recipe.document.problem(
                "data", "training needs data, as `data: {name: digits}` or by `extends: [NETWORK, imagenet-adamw-300]`"
            )
        )
    if not recipe.data.name.startswith("python:"):
        return ImageData(recipe, trained, classes, split)
    make = import_callable(recipe.data.name, allow_python, partial(recipe.document.problem, "data.name"))
    module = make(**recipe.data.args)
    if not isinstance(module, LightningDataModule):
        message = f'"{recipe.data.name}" gave a {type(module).__name__}; a LightningDataModule is needed'
        raise RecipeError(recipe.document.problem("data.name", message))
    return module


class ImageData(LightningDataModule):
    """Images of a named data set, with their transforms.

    Attributes:
        parts: "train", "val" and "test", those that there are; a share of the training images validates where the data
            has no part for it.
        split: the training images that validate; None where the data has a part of its own, or there is to be none.
        num_classes: the data set's classes.
        classes: their names, in the order of their numbers; none where the data set has no names.
        class_counts: the training images of each class.
        notes: what is to be said of the parts, a line each.

    Raises:
        RecipeError: mean or std of another number of channels than the images have.
    """

    def __init__(
        self,
        recipe: Recipe,
        trained: Preprocessing | None = None,
        classes: Sequence[str] = (),
        split: Split | None = None,
    ) -> None:
        super().__init__()
        assert recipe.data is not None
        self.data = recipe.data
        self.batch_size = recipe.data.batch_size  # Lightning's Tuner changes it
        self.seed = recipe.train.seed if recipe.train else 0
        source = open_source(recipe, self.data, classes)
        self.num_classes = source.num_classes
        self.classes = source.classes
        samples, self.split, self.notes = divided(recipe, source, split)
        _check_channels(recipe, channels(next(iter(samples.values()))))
        self.parts: dict[str, Transformed] = {}
        self._steps = {"train": transform(recipe, "train"), "eval": transform(recipe, "eval", trained)}
        for part, images in samples.items():
            section = "train" if part == "train" else "eval"
            chosen = even_subset(images, (self.data.train if part == "train" else self.data.eval).get("samples"))
            self.parts[part] = self._transformed(chosen, section)
        if "train" in self.parts:
            self.parts["train"].fills = True
        if self.data.sampling == "balanced" and "train" in self.parts:
            self.parts["train"].places = BalancedPlaces(targets_of(self.parts["train"].samples), self.seed)
        self.mix = _mix(recipe, self.num_classes)

    def _transformed(self, samples: Samples, section: str) -> Transformed:
        seed = self.seed if section == "train" else 0
        skip = self.data.broken == "skip"
        return Transformed(samples, self._steps[section], seed, f"data.{section}.size", skip=skip)

    @property
    def class_counts(self) -> list[int]:
        """Return the training images of each class."""
        targets = targets_of(self.parts["train"].samples)
        counts = targets.sum(dim=0) if targets.ndim > 1 else torch.bincount(targets, minlength=self.num_classes)
        return [int(count) for count in counts]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, in an order that follows from seed and epoch; it resumes in mid-epoch.

        A last batch of one image is left out, another image each epoch: batch norms have no statistics of it.
        """
        images = self.parts["train"]
        order = EpochSampler(images, self.seed)
        return ImageLoader(
            images, self.batch_size, sampler=order, drop_last=self._leaves_one(len(images)), **self._loading()
        )

    def _leaves_one(self, images: int) -> bool:
        """Return whether the last of several batches has one image, in each process."""
        processes = self.trainer.world_size if self.trainer is not None else 1
        share = math.ceil(images / processes)
        # Of no more images than there are processes, the batches of all together would say another number of steps.
        return self.batch_size > processes and share > self.batch_size and share % self.batch_size == 1

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation images, in their own order; an empty list where there are none."""
        return self.evaluation_loader("val") if "val" in self.parts else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the test images, in their own order; an empty list where there are none."""
        return self.evaluation_loader("test") if "test" in self.parts else []

    def evaluation_loader(self, part: str) -> DataLoader[Any]:
        """Return the images of a part as they are evaluated, in their own order, those of training too.

        Raises:
            KeyError: there is no such part.
        """
        images = self.parts[part] if part != "train" else self._transformed(self.parts[part].samples, "eval")
        return ImageLoader(images, self.data.eval_batch_size or self.batch_size, **self._loading())

    def first(self) -> Tensor:  # [c x h x w]
        """Return the first image that evaluation sees and that can be read.

        Raises:
            RunError: there is none, **or** one that cannot be read and is not to be left out.
        """
        part = next(part for part in ("val", "test", "train") if part in self.parts)
        return self.parts[part].first()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mix the images of a training batch, on the device where the network runs."""
        if self.mix is None or self.trainer is None or not self.trainer.training:
            return batch
        images, targets = self.mix(*batch)
        return images, targets

    def _loading(self) -> dict[str, Any]:
        workers = self.data.workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": _as_it_is,
        }


@dataclass(frozen=True)
class Unreadable:
    """What a worker hands over in place of a batch: an exception would arrive as the text of its traceback."""

    reason: str


class LeftOutError(RunError):
    """Raised, and handed over, in place of a batch of which no image can be read, where such images are left out."""


class Transformed(Dataset[Any]):
    """A data set with a transform for its images, read in whole batches.

    The random numbers of an image follow from the seed, the epoch and its index; evaluation stays in epoch 0, and
    repeats them.

    Args:
        samples: the data set.
        steps: the transform of one image; of images in memory it is applied to whole batches.
        seed: of the transform's random numbers.
        size_key: key of the recipe that gives all images one size.
        skip: leave images out that cannot be read, with a warning; a batch then has fewer.

    Attributes:
        places: which image stands at which place of an epoch, where that is not each at its own.
        fills: whether the next images that can be read stand in for a batch without any, as in training, whose steps
            are counted; in evaluation there is no such batch.
    """

    def __init__(self, samples: Samples, steps: v2.Compose, seed: int, size_key: str, *, skip: bool = False) -> None:
        self.samples = samples
        self.steps = steps
        self.seed = seed
        self.size_key = size_key
        self.skip = skip
        self.skipped: set[int] = set()
        self.places: BalancedPlaces | None = None
        self.fills = False
        self.batch_steps = batchwise(steps) if isinstance(whole(samples), Images) else None
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        images, targets = self.read([index])
        return images[0], targets[0] if targets.ndim > 1 else int(targets[0])

    def __getitems__(self, indices: list[int]) -> Batch | Unreadable | LeftOutError:
        """Return a batch; DataLoader asks so for what `__getitem__` would give one by one."""
        try:
            return self.read(indices)
        except LeftOutError as left_out:
            return self._batch_after(indices) if self.fills else left_out
        except RunError as error:
            return Unreadable(str(error))

    def read(self, indices: list[int]) -> Batch:
        """Return images and classes of a batch.

        Raises:
            LeftOutError: none of the images can be read, and such images are left out.
            RunError: an image that cannot be read, **or** images of different size.
        """
        epoch = int(self.epoch)
        draws = Draws(self.seed, epoch, indices)  # of places: an image that is drawn twice is changed in two ways
        indices = indices if self.places is None else self.places.at(epoch, indices)
        if self.batch_steps is not None:
            images, targets = self.samples.batch(indices)  # type: ignore[attr-defined]
            for number, step in enumerate(self.batch_steps):
                images = step(images, draws, number)
            return images, targets
        transformed, classes, read = [], [], []
        with own_random_numbers():
            for index, seed in zip(indices, draws.seeds(0), strict=True):
                try:
                    image, target = self.samples[index]
                except RunError as error:
                    self._leave_out(index, error)
                    continue
                seed_everywhere(seed)
                transformed.append(self.steps(image))
                classes.append(torch.as_tensor(target))
                read.append(index)
        if not read:
            raise LeftOutError(f"{file_of(self.samples, indices[0])}: no image of this batch can be read")
        self._check_sizes(transformed, read)
        return torch.stack(transformed), torch.stack(classes)

    def first(self) -> Tensor:  # [c x h x w]
        """Return the first image that can be read.

        Raises:
            RunError: there is none, **or** one that cannot be read and is not to be left out.
        """
        for index in range(len(self)):
            try:
                return self[index][0]
            except RunError:
                if not self.skip:
                    raise
        raise RunError(NONE_READ)

    def _batch_after(self, indices: list[int]) -> Batch | Unreadable:
        for first in range(indices[-1] + 1, indices[-1] + len(self), len(indices)):
            with suppress(LeftOutError):
                return self.read([(first + number) % len(self) for number in range(len(indices))])
        return Unreadable(NONE_READ)

    def _leave_out(self, index: int, error: RunError) -> None:
        if not self.skip:
            raise error
        if index not in self.skipped:
            self.skipped.add(index)
            log.warning("left out: %s", error)

    def _check_sizes(self, images: list[Tensor], indices: list[int]) -> None:
        first = images[0].shape
        other = next((number for number, image in enumerate(images) if image.shape != first), None)
        if other is not None:
            sizes = " and ".join(
                f"{image.shape[-2]}×{image.shape[-1]} ({file_of(self.samples, indices[number])})"
                for number, image in ((0, images[0]), (other, images[other]))
            )
            raise RunError(f"data: images of different size, {sizes}; give them one by {self.size_key}")


class ImageLoader(ResumableDataLoader):
    """Batches of `Transformed`, which is told the epoch first.

    Raises:
        RunError: an image cannot be read, in this process or in a worker, **or** all are left out.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        assert isinstance(self.dataset, Transformed)
        self.dataset.epoch.fill_(getattr(self._epoch_sampler(), "epoch", 0))
        read = left_out = False
        for batch in super().__iter__():
            if isinstance(batch, Unreadable):
                raise RunError(batch.reason)
            if isinstance(batch, LeftOutError):
                left_out = True
                continue
            read = True
            yield batch
        if left_out and not read:
            raise RunError(NONE_READ)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _check_channels(recipe: Recipe, count: int) -> None:
    assert recipe.data is not None
    problems = [
        recipe.document.problem(
            f"data.{section}.{key}",
            f"found {len(values)} values, allowed: {count}, one for each channel of the images" + " or 1" * (count > 1),
        )
        for section, options in (("train", recipe.data.train), ("eval", recipe.data.eval))
        for key in ("mean", "std")
        if len(values := options.get(key, ())) not in (0, 1, count)
    ]
    if problems:
        raise RecipeError(problems)


class EpochSampler(RandomSampler):
    """A random order that follows from a seed and the epoch alone.

    Lightning tells it the epoch, and puts its distributed sampler in its place where there are several devices. An
    order drawn from a generator would begin anew in a run that is resumed between two epochs.
    """

    def __init__(self, images: Transformed, seed: int) -> None:
        super().__init__(images)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(len(self), generator=generator).tolist()


def _mix(recipe: Recipe, num_classes: int) -> v2.Transform | None:
    train = recipe.train
    if train is None:
        return None
    mixes: list[v2.Transform] = []
    if train.mixup > 0:
        mixes.append(v2.MixUp(alpha=train.mixup, num_classes=num_classes))
    if train.cutmix > 0:
        mixes.append(v2.CutMix(alpha=train.cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None
