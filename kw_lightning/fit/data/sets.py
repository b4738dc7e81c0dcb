"""The data sets by name. Each is one function: the recipe's `data` in, training and evaluation images out."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from kw_lightning.errors import RecipeError, RunError, first_line, mistake
from kw_lightning.paths import user_path
from kw_lightning.recipe.types import Data, Recipe

Samples = Dataset[tuple[Any, int]]
"""Pairs of an image (a PIL image, or a uint8 tensor [c, h, w]) and its class."""

DIGITS_TRAIN = 1200
"""Images of the digits that train; the rest evaluates. See digits.md."""


@dataclass(frozen=True)
class Source:
    """The two parts of a data set and how many classes it has."""

    train: Samples
    evaluation: Samples
    num_classes: int


DATA_SETS: dict[str, Callable[..., Source]] = {}
"""Name → function of the recipe's `data` and, as keywords, of its `data.args`."""


def data_set(function: Callable[..., Source]) -> Callable[..., Source]:
    """Register a data set under the function's name."""
    DATA_SETS[function.__name__] = function
    return function


def open_source(recipe: Recipe, data: Data) -> Source:
    """Open the data set that a recipe names.

    Raises:
        RecipeError: no data set has that name, **or** it does not take an argument of `data.args`.
        RunError: the data is not there.
    """
    if data.name not in DATA_SETS:
        message = mistake(data.name, DATA_SETS, what="the unknown data set")
        raise RecipeError(recipe.document.problem("data.name", message))
    function = DATA_SETS[data.name]
    allowed = list(inspect.signature(function).parameters)[1:]
    problems = [
        recipe.document.problem(f"data.args.{key}", mistake(key, allowed, what="the unknown argument"))
        for key in data.args
        if key not in allowed
    ]
    if problems:
        raise RecipeError(problems)
    return function(data, **data.args)


class Images(Dataset[tuple[Any, int]]):
    """Images in memory: uint8 [n, c, h, w] and their classes."""

    def __init__(self, images: Tensor, targets: Sequence[int]) -> None:
        self.images = images
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], self.targets[index]


class Subset(Dataset[tuple[Any, int]]):
    """Some samples of a data set."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples = samples
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[self.indices[index]]


def even_subset(samples: Samples, count: int | None) -> Samples:
    """Return the first samples of every class in turn, `count` together; all where no count is given."""
    targets = [int(target) for target in getattr(samples, "targets", ())]
    if count is None or count >= len(targets):
        return samples
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for index, target in enumerate(targets):
        turns.append((seen[target], target, index))
        seen[target] += 1
    return Subset(samples, sorted(index for _, _, index in sorted(turns)[:count]))


def in_memory(samples: Samples) -> bool:
    """Tell whether a data set holds its images in memory, and few of them."""
    inner = samples.samples if isinstance(samples, Subset) else samples
    return isinstance(inner, Images) and len(inner.images) == len(inner.targets)


@data_set
def digits(data: Data) -> Source:
    """Return the handwritten digits of UCI that ship with the package: [1, 8, 8], 10 classes."""
    with (files("kw_lightning.fit.data") / "digits.npz").open("rb") as file, np.load(file) as archive:
        grey = torch.from_numpy(archive["images"].astype(np.int32))  # 0 to 16
        labels = archive["labels"].tolist()
    images = (grey * 255 // 16).to(torch.uint8).unsqueeze(1)
    return Source(
        Images(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]), Images(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]), 10
    )


@data_set
def fake(
    data: Data, shape: Sequence[int] = (3, 224, 224), classes: int = 1000, train: int = 10_000, evaluation: int = 1_000
) -> Source:
    """Return noise with made-up classes, for measuring speed: nothing is read and nothing can be learnt from it."""
    noise = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Source(
        Images(noise, [index % classes for index in range(train)]),
        Images(noise, [index % classes for index in range(evaluation)]),
        classes,
    )


@data_set
def image_folder(data: Data, train: str = "train", evaluation: str = "val") -> Source:
    """Return the images of ROOT/train/CLASS/… and ROOT/val/CLASS/…, as ImageNet is laid out."""
    root = _root(data)
    parts = []
    for folder in (train, evaluation):
        try:
            parts.append(torchvision.datasets.ImageFolder(str(root / folder)))
        except OSError as error:  # no folder, no class folders, or a class without images
            raise RunError(f"data: {root / folder} holds no images in class folders: {first_line(error)}") from error
    if parts[0].classes != parts[1].classes:
        differing = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise RunError(f"data: {root}/{train} and {root}/{evaluation} differ in classes: {', '.join(differing[:5])}")
    return Source(parts[0], parts[1], len(parts[0].classes))


@data_set
def cifar10(data: Data, download: bool = False) -> Source:
    """Return CIFAR-10: [3, 32, 32], 10 classes."""
    return _torchvision(torchvision.datasets.CIFAR10, data, 10, download)


@data_set
def cifar100(data: Data, download: bool = False) -> Source:
    """Return CIFAR-100: [3, 32, 32], 100 classes."""
    return _torchvision(torchvision.datasets.CIFAR100, data, 100, download)


@data_set
def mnist(data: Data, download: bool = False) -> Source:
    """Return MNIST: [1, 28, 28], 10 classes."""
    return _torchvision(torchvision.datasets.MNIST, data, 10, download)


@data_set
def fashion_mnist(data: Data, download: bool = False) -> Source:
    """Return Fashion-MNIST: [1, 28, 28], 10 classes."""
    return _torchvision(torchvision.datasets.FashionMNIST, data, 10, download)


def _torchvision(dataset: Callable[..., Samples], data: Data, num_classes: int, download: bool) -> Source:
    root = _root(data)
    try:
        return Source(
            dataset(root=str(root), train=True, download=download),
            dataset(root=str(root), train=False, download=download),
            num_classes,
        )
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError where files are missing or damaged
        if download:
            raise RunError(f"data: {data.name} could not be downloaded to {root}: {first_line(error)}") from error
        raise RunError(
            f"data: {data.name} is not in {root}. Put it there as torchvision expects it, "
            "or let torchvision fetch it: data.args.download=true"
        ) from error


def _root(data: Data) -> Path:
    return user_path(data.root or "~/data")
