"""The data module: a data set by name, its transforms, its loaders, and mixup and CutMix over whole batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kw_lightning.backbones import import_callable
from kw_lightning.errors import RecipeError
from kw_lightning.fit.data.division import divided
from kw_lightning.fit.data.sampling import BalancedPlaces, EpochSampler
from kw_lightning.fit.data.sets import Samples, channels, even_subset, open_source, targets_of
from kw_lightning.fit.data.splitting import Split
from kw_lightning.fit.data.transformed import Batch, ImageLoader, Transformed, as_it_is
from kw_lightning.fit.data.transforms import transform
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe.types import Recipe


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
            "collate_fn": as_it_is,
        }


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
