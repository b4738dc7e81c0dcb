"""The data sets by name. Each is one function: the recipe's `data` in, its parts out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from kw_lightning.fit.data.files import ImageFiles, Target, parts_of
from kw_lightning.fit.data.hugging_face import PREFIX, open_parts
from kw_lightning.fit.data.listing import SEPARATORS, Listing, list_folder, list_table, rarest
from kw_lightning.fit.data.splitting import Name
from kw_lightning.paths import user_path
from kw_lightning.recipe.types import Data, Recipe

Samples = Dataset[tuple[Any, Target]]
"""Pairs of an image (a PIL image, or a uint8 tensor [c, h, w]) and its class or classes."""

DIGITS_TRAIN = 1200
"""Images of the digits that train; the rest tests. See digits.md."""

NOISE = 1 << 28
"""Most bytes of the noise of `fake`, unless one image has more."""


@dataclass(frozen=True)
class Source:
    """A data set with the parts that it comes with.

    Attributes:
        parts: "train", "validation" and "test", those that it has; only a network that is trained already does
            without "train".
        num_classes: how many classes it has.
        classes: their names in the order of their numbers, if they have any.

    Raises:
        RunError: fewer than two classes.
    """

    parts: Mapping[str, Samples]
    num_classes: int
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            only = f', "{self.classes[0]}"' if self.classes else ""
            raise RunError(f"data: found a single class{only}, allowed: two or more, to tell apart")


DATA_SETS: dict[str, Callable[..., Source]] = {}
"""Name → function of the recipe's `data` and, as keywords, of its `data.args`."""


FILES = ("image_folder", "csv")
"""Data sets of image files."""


def data_set(function: Callable[..., Source]) -> Callable[..., Source]:
    """Register a data set under the function's name."""
    DATA_SETS[function.__name__] = function
    return function


def open_source(recipe: Recipe, data: Data, trained: Sequence[str] = ()) -> Source:
    """Open the data set that a recipe names.

    Args:
        recipe: the recipe.
        data: its data.
        trained: the classes of a network that is only evaluated: image files take their numbers from them, and need no
            training part.

    Raises:
        RecipeError: no data set has that name.
        RunError: the data is not there.
    """
    if data.name.startswith(PREFIX):
        parts, classes = open_parts(data.name.removeprefix(PREFIX), several=data.labels == "several", **data.args)
        return Source(parts, len(classes), classes)
    if data.name not in DATA_SETS:
        message = mistake(data.name, DATA_SETS, what="the unknown data set")
        raise RecipeError(recipe.document.problem("data.name", message))
    if trained and data.name in FILES:
        return _listed(data, trained)
    return DATA_SETS[data.name](data, **data.args)  # the schema has checked them


class Images(Dataset[tuple[Any, Target]]):
    """Images in memory, uint8 [n, c, h, w], and their targets; where there are more targets, the images repeat."""

    def __init__(self, images: Tensor, targets: Sequence[int] | Tensor) -> None:
        self.images = images
        self.targets = torch.as_tensor(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], int(self.targets[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:  # [b x c x h x w], [b]
        """Return several images and their classes at once."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen % len(self.images)], self.targets[chosen]


class Subset(Dataset[tuple[Any, Target]]):
    """Some samples of a data set; of a subset, its data set's."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        inner = samples if isinstance(samples, Subset) else None
        self.samples: Samples = inner.samples if inner is not None else samples
        self.indices: Sequence[int] = [inner.indices[index] for index in indices] if inner is not None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        return self.samples[self.indices[index]]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return several of the samples at once, of a data set in memory."""
        assert isinstance(self.samples, Images)
        return self.samples.batch([self.indices[index] for index in indices])


def names_of(samples: Samples) -> Sequence[Name]:
    """Return what each sample is known by: its file, or its place where it has none."""
    return samples.names if isinstance(samples, ImageFiles) else range(len(samples))  # type: ignore[arg-type]


def even_subset(samples: Samples, count: int | None) -> Samples:
    """Return the first samples of every class in turn, `count` together; all where no count is given.

    A sample of several classes counts as one of its rarest.
    """
    if count is None or count >= len(samples):  # type: ignore[arg-type]
        return samples
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for index, target in enumerate(strata_of(samples)):
        turns.append((seen[target], target, index))
        seen[target] += 1
    return Subset(samples, sorted(index for _, _, index in sorted(turns)[:count]))


def targets_of(samples: Samples) -> Tensor:  # [n], or of several labels [n x k]
    """Return the targets of all samples, without reading an image."""
    if isinstance(samples, Subset):
        return targets_of(samples.samples)[torch.as_tensor(samples.indices)]
    targets: Any = samples.targets  # type: ignore[attr-defined]
    several = isinstance(targets, list) and targets and isinstance(targets[0], Tensor)
    return torch.stack(targets) if several else torch.as_tensor(targets)


def strata_of(samples: Samples) -> list[int]:
    """Return the class that each sample counts as one of: of several its rarest, of none -1."""
    targets: list[Any] = targets_of(samples).tolist()
    if not targets or not isinstance(targets[0], list):
        return targets
    named = rarest([[f"{number:09}" for number, value in enumerate(row) if value] for row in targets])
    return [int(name or -1) for name in named]


def whole(samples: Samples) -> Samples:
    """Return the data set that a subset is of, or the data set itself."""
    return samples.samples if isinstance(samples, Subset) else samples


def channels(samples: Samples) -> int:
    """Return the channels of a data set's images; files are read as RGB."""
    inner = whole(samples)
    return inner.images.shape[1] if isinstance(inner, Images) else 3


def file_of(samples: Samples, index: int) -> str:
    """Return the file that an image was read from; empty where there is none."""
    if isinstance(samples, Subset):
        return file_of(samples.samples, samples.indices[index])
    return str(samples.samples[index][0]) if isinstance(samples, ImageFiles) else ""


@data_set
def digits(data: Data) -> Source:
    """Return the handwritten digits of UCI that ship with the package: [1, 8, 8], 10 classes."""
    with (files("kw_lightning.fit.data") / "digits.npz").open("rb") as file, np.load(file) as archive:
        grey = torch.from_numpy(archive["images"].astype(np.int32))  # 0 to 16
        labels = archive["labels"].tolist()
    images = (grey * 255 // 16).to(torch.uint8).unsqueeze(1)
    slices = {"train": slice(DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None)}
    parts = {part: Images(images[chosen], labels[chosen]) for part, chosen in slices.items()}
    return Source(parts, 10, tuple("0123456789"))


@data_set
def fake(
    data: Data, shape: Sequence[int] = (3, 224, 224), classes: int = 1000, train: int = 10_000, evaluation: int = 1_000
) -> Source:
    """Return noise with made-up classes, for measuring speed: nothing is read and nothing can be learnt from it."""
    count = max(1, min(64, NOISE // math.prod(shape)))
    noise = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    counts = {"train": train, "validation": evaluation}
    return Source({part: Images(noise, torch.arange(count) % classes) for part, count in counts.items()}, classes)


@data_set
def image_folder(
    data: Data, train: str | None = None, evaluation: str | None = None, test: str | None = None
) -> Source:
    """Return the images of ROOT/train/CLASS/…, of `val` and `test` beside it if they are there, or of ROOT/CLASS/…."""
    return _listed(data)


@data_set
def csv(data: Data, separator: str = SEPARATORS[0]) -> Source:
    """Return the images of a table `path,label[,split]`, which is the root itself; with one label or several."""
    return _listed(data)


def listing_of(data: Data, *, training: bool = True) -> Listing | None:
    """Return the image files that a recipe's data means; None where its images are not in files of their own.

    Args:
        data: the recipe's data.
        training: whether training images are needed.

    Raises:
        RunError: the data is not there, **or** mistakes in a table.
    """
    root = _root(data)
    if data.name == "image_folder":
        keys = {"train": "train", "validation": "evaluation", "test": "test"}
        given = {part: data.args.get(key) for part, key in keys.items()}
        return list_folder(root, {part: name for part, name in given.items() if name is not None}, training=training)
    if data.name != "csv":
        return None
    if root.is_dir():
        raise RunError(f"data: {root} is a folder; data.root of csv is the table itself, as {root / 'images.csv'}")
    separator = data.args.get("separator", SEPARATORS[0]) if data.labels == "several" else None
    return list_table(root, training=training, separator=separator)


def source_of(listing: Listing, trained: Sequence[str] = ()) -> Source:
    """Return listed image files as a data set.

    Args:
        listing: the images.
        trained: the classes of a network that is only evaluated, in its order.

    Raises:
        RunError: fewer than two classes, **or** images of a class that no training image has, or that the network does
            not know.
    """
    parts, classes = parts_of(listing, trained)
    return Source(parts, len(classes), classes)


def _listed(data: Data, trained: Sequence[str] = ()) -> Source:
    listing = listing_of(data, training=not trained)
    assert listing is not None
    return source_of(listing, trained)


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


def _torchvision(dataset: Callable[..., Any], data: Data, num_classes: int, download: bool) -> Source:
    root = _root(data)
    try:
        parts = {name: dataset(root=str(root), train=name == "train", download=download) for name in ("train", "test")}
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError where files are missing or damaged
        if download:
            raise RunError(f"data: {data.name} could not be downloaded to {root}: {first_line(error)}") from error
        raise RunError(
            f"data: {data.name} is not in {root}. Put it there as torchvision expects it, "
            "or let torchvision fetch it: data.args.download=true"
        ) from error
    held = {name: _held(part) for name, part in parts.items()}
    return Source(held, num_classes, tuple(parts["train"].classes))


def _held(part: Any) -> Images:
    """Return a data set that torchvision holds in memory: MNIST's are [n, h, w], CIFAR's [n, h, w, c]."""
    images = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Images(images, part.targets)


def _root(data: Data) -> Path:
    return user_path(data.root or "~/data")
