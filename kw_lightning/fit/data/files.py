"""Image files as a data set: a listing's parts, read when they are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kw_lightning.errors import RunError
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.data.listing import Entry, Listing, rarest

HELD_OUT = 0.1
"""Share of the training images that evaluates where the data has no validation part."""


Target = int | Tensor
"""The number of a class, or of images with several labels [k]: 1 for each class of the image and 0 for the others."""


class ImageFiles(Dataset[tuple[Any, Target]]):
    """Image files and their classes.

    Attributes:
        samples: (file, target).
        targets: the targets.
        loader: function that reads a file.
    """

    def __init__(self, samples: Sequence[tuple[str, Target]], loader: Callable[[str], Any] = read_image) -> None:
        self.samples = list(samples)
        self.targets = [target for _, target in self.samples]
        self.loader = loader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        file, target = self.samples[index]
        return self.loader(file), target


def parts_of(listing: Listing, trained: Sequence[str] = ()) -> tuple[ImageFiles, ImageFiles, tuple[str, ...], str]:
    """Return training images, evaluation images, the names of the classes, and what is to be said of the parts.

    Args:
        listing: the images.
        trained: the classes of a network that is only evaluated, in its order; there may be no training images then,
            and a test part serves where there is no validation part either.

    Raises:
        RunError: evaluation images of a class that no training image has, **or** too few images to hold some out.
    """
    training, evaluation, note = listing.part("train"), listing.part("validation"), ""
    if trained and not evaluation and not training:
        evaluation = listing.part("test")
    if not evaluation:
        kept, held = hold_out(rarest([listing.labels(entry) for entry in training]), HELD_OUT)
        training, evaluation = [training[place] for place in kept], [training[place] for place in held]
        if not evaluation:
            raise RunError(f"data: {listing.source} has no validation part, and no class has two images to make one of")
        note = (
            f"{listing.source} has no validation part: {len(evaluation):,} of its "
            f"{len(training) + len(evaluation):,} training images, evenly from every class, are held out for it"
        )
    classes = tuple(trained) or listing.classes
    differing = sorted({label for entry in evaluation for label in listing.labels(entry)} - set(classes))
    if differing:
        names = [listing.names.get(part, part) for part in ("train", "validation")]
        if trained:
            raise RunError(f"data: {listing.source}: the network knows no class {', '.join(differing[:5])}")
        raise RunError(
            f"data: {listing.source}: {names[0]} and {names[1]} differ in classes: "
            f"{', '.join(differing[:5])} of {names[1]} {'is' if len(differing) == 1 else 'are'} not in {names[0]}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    train, validation = (_numbered(listing, part, numbers) for part in (training, evaluation))
    return train, validation, classes, note


def _numbered(listing: Listing, entries: Sequence[Entry], numbers: Mapping[str, int]) -> ImageFiles:
    """Return image files with the numbers of their classes."""
    if listing.separator is None:
        return ImageFiles([(entry.file, numbers[entry.label]) for entry in entries if entry.label in numbers])
    targets = torch.zeros(len(entries), len(numbers))
    for target, entry in zip(targets, entries, strict=True):
        target[[numbers[label] for label in listing.labels(entry) if label in numbers]] = 1
    return ImageFiles([(entry.file, target) for entry, target in zip(entries, targets, strict=True)])


def hold_out(labels: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Return the places that are left and those held out: the share of every class, one at least of a class of two.

    It is the same in every run of the same images: which ones, does not depend on the run's seed.
    """
    places = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    generator = torch.Generator().manual_seed(0)
    held: set[int] = set()
    for label in sorted(places):
        order = torch.randperm(len(places[label]), generator=generator).tolist()
        count = max(1, round(share * len(order))) if len(order) > 1 else 0
        held |= {places[label][index] for index in order[:count]}
    return [place for place in range(len(labels)) if place not in held], sorted(held)
