"""Image files as a data set: a listing's parts, read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kw_lightning.errors import RunError, listed
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.data.listing import PARTS, Entry, Listing

Target = int | Tensor
"""The number of a class, or of images with several labels [k]: 1 for each class of the image and 0 for the others."""


class ImageFiles(Dataset[tuple[Any, Target]]):
    """Image files and their classes.

    Attributes:
        samples: (file, target).
        targets: the targets.
        root: folder that the files are named from.
        loader: function that reads a file.
    """

    def __init__(
        self, samples: Sequence[tuple[str, Target]], root: str = "", loader: Callable[[str], Any] = read_image
    ) -> None:
        self.samples = list(samples)
        self.root = root
        self.targets = [target for _, target in self.samples]
        self.loader = loader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        file, target = self.samples[index]
        return self.loader(file), target

    @property
    def names(self) -> list[str]:
        """Return what each image is known by in a copy of the data elsewhere."""
        beginning = os.path.join(self.root, "")
        return [file.removeprefix(beginning).replace(os.sep, "/") for file, _ in self.samples]


def parts_of(listing: Listing, trained: Sequence[str] = ()) -> tuple[dict[str, ImageFiles], tuple[str, ...]]:
    """Return the parts that a listing has, by name, and the names of the classes.

    Args:
        listing: the images.
        trained: the classes of a network that is only evaluated, in its order; there may be no training images then.

    Raises:
        RunError: images of a class that no training image has, or that the network does not know.
    """
    classes = tuple(trained) or listing.classes
    numbers = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part in PARTS:
        entries = listing.part(part)
        if part == "train" and trained and listing.separator is None:  # what the network cannot name has not trained it
            entries = [entry for entry in entries if entry.label in numbers]
        differing = sorted({label for entry in entries for label in listing.labels(entry)} - numbers.keys())
        if differing and not (part == "train" and trained):
            raise RunError(f"data: {listing.source}: {_differ(listing, part, differing, bool(trained))}")
        if entries:
            parts[part] = _numbered(listing, entries, numbers)
    return parts, classes


def _numbered(listing: Listing, entries: Sequence[Entry], numbers: Mapping[str, int]) -> ImageFiles:
    """Return image files with the numbers of their classes."""
    root = str(listing.source if listing.source.is_dir() else listing.source.parent)
    if listing.separator is None:
        return ImageFiles([(entry.file, numbers[entry.label]) for entry in entries], root)
    targets = torch.zeros(len(entries), len(numbers))
    for target, entry in zip(targets, entries, strict=True):
        target[[numbers[label] for label in listing.labels(entry) if label in numbers]] = 1
    return ImageFiles([(entry.file, target) for entry, target in zip(entries, targets, strict=True)], root)


def _differ(listing: Listing, part: str, classes: Sequence[str], trained: bool) -> str:
    if trained:
        return f"the network knows no class {listed(classes)}"
    own, train = listing.names.get(part, part), listing.names.get("train", "train")
    are = "is" if len(classes) == 1 else "are"
    return f"{train} and {own} differ in classes: {listed(classes)} of {own} {are} not in {train}"
