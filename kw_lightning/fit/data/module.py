"""The data module: a data set by name, its transforms, its loaders, and mixup and CutMix over whole batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from kw_lightning.backbones import import_callable
from kw_lightning.callbacks.resume import ResumableDataLoader
from kw_lightning.errors import RecipeError
from kw_lightning.fit.data.sets import Samples, even_subset, in_memory, open_source
from kw_lightning.fit.data.transforms import Seeded, is_random, transform
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe.types import Recipe

Batch = tuple[Tensor, Tensor]
"""Images [b, c, h, w] and classes [b], or with mixup the classes' shares [b, classes]."""


def data_module(
    recipe: Recipe, *, allow_python: Sequence[str] = (), trained: Preprocessing | None = None
) -> LightningDataModule:
    """Return the data module of a recipe.

    Args:
        recipe: the recipe.
        allow_python: packages whose code the recipe may name.
        trained: what the network of a checkpoint was evaluated with; the recipe's own without it.

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
        return ImageData(recipe, trained)
    make = import_callable(recipe.data.name, allow_python, partial(recipe.document.problem, "data.name"))
    module = make(**recipe.data.args)
    if not isinstance(module, LightningDataModule):
        message = f'"{recipe.data.name}" gave a {type(module).__name__}; a LightningDataModule is needed'
        raise RecipeError(recipe.document.problem("data.name", message))
    return module


class ImageData(LightningDataModule):
    """Images of a named data set, with their transforms.

    Attributes:
        num_classes: the data set's classes.
    """

    def __init__(self, recipe: Recipe, trained: Preprocessing | None = None) -> None:
        super().__init__()
        assert recipe.data is not None
        self.data = recipe.data
        self.seed = recipe.train.seed if recipe.train else 0
        source = open_source(recipe, self.data)
        self.num_classes = source.num_classes
        self.train_images = Transformed(
            even_subset(source.train, self.data.train.get("samples")),
            transform(recipe, "train"),
            random=is_random(self.data.train),
            repeatable=False,
        )
        self.eval_images = Transformed(
            even_subset(source.evaluation, self.data.eval.get("samples")),
            transform(recipe, "eval", trained),
            random=is_random(self.data.eval),
            repeatable=True,
        )
        self.mix = _mix(recipe, self.num_classes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, in an order that follows from seed and epoch; it resumes in mid-epoch."""
        order = EpochSampler(self.train_images, self.seed)
        return ResumableDataLoader(self.train_images, self.data.batch_size, sampler=order, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the evaluation images, in their own order."""
        return DataLoader(self.eval_images, self.data.eval_batch_size or self.data.batch_size, **self._loading())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mix the images of a training batch, on the device where the network runs."""
        if self.mix is None or self.trainer is None or not self.trainer.training:
            return batch
        images, targets = self.mix(*batch)
        return images, targets

    def _loading(self) -> dict[str, Any]:
        workers = self.data.workers
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}


class Transformed(Dataset[tuple[Tensor, int]]):
    """A data set with a transform for its images.

    Args:
        samples: the data set.
        steps: the transform.
        random: whether the transform draws random numbers.
        repeatable: whether it is to draw the same ones for an image every time.
    """

    def __init__(self, samples: Samples, steps: v2.Transform, *, random: bool, repeatable: bool) -> None:
        self.samples = samples
        self.steps = Seeded(steps) if random and repeatable else steps
        # What comes out the same every time is kept where the images are in memory anyway.
        self.kept: dict[int, tuple[Tensor, int]] | None = (
            {} if in_memory(samples) and (repeatable or not random) else None
        )

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        image, target = self.samples[index]
        image = self.steps(image, index) if isinstance(self.steps, Seeded) else self.steps(image)
        if self.kept is not None:
            self.kept[index] = image, int(target)
        return image, int(target)


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
