"""What `kw new --data` writes for images of one's own: how they are read, and a training for so many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kw_lightning.recipe.writing import to_yaml

if TYPE_CHECKING:
    from kw_lightning.fit.data.looking import Look

_TEXT = """\
temperature: {{end: 0, epochs: {annealing}}}

data:
  name: {name}
{root}{labels}{validation}  batch_size: {batch_size}
  workers: {workers}
  # Mean, std and interpolation, and in evaluation the crop, are those of the network's weights: `kw plan` shows them.
  # flip mirrors images at random: set it to false for text, digits or signs.
  train: {{crop: random_resized, scale: [{scale}, 1], size: {size}, flip: true, rand_augment: {augment}}}

train:
  epochs: {epochs}               # for {count:,} training images{start}
  optimizer: {{name: AdamW, lr: {lr}, weight_decay: 0.05, no_decay: vectors}}
  schedule: {{name: cosine, warmup_epochs: {warmup}}}
{loss}"""
VALIDATION = "  validation: 0.1           # of the training images, evenly from every class\n"
UNEQUAL = "  # class_weights: balanced  # the classes are unequal: lets each count the same in the loss\n"
MULTIPLE = 32
"""Sides of images are chosen in multiples of what most networks shrink them by."""


@dataclass(frozen=True)
class Training:
    """A training for a number of images.

    Attributes:
        batch_size: images of a step: a tenth of them in a small set, so that an epoch has several steps.
        epochs: so many that images are seen as often as it takes, within bounds.
        warmup, annealing: epochs of the learning rate's way up, and of the temperature's way down.
    """

    batch_size: int
    epochs: int
    warmup: int
    annealing: int


def training_for(images: int, *, pretrained: bool) -> Training:
    """Return a training for so many images; from pretrained weights far fewer epochs are needed."""
    batch_size = min(max(2 ** int(math.log2(max(images, 10) / 10)), 8), 64 if images < 50_000 else 128)
    seen, least, most = (30_000, 10, 50) if pretrained else (1_000_000, 60, 200)
    epochs = min(max(math.ceil(seen / max(images, 1)), least), most)
    return Training(batch_size, epochs, max(1, epochs // 20), max(1, epochs // (5 if pretrained else 10)))


def size_for(found: Look, usual: int) -> int:
    """Return the side at which images train from scratch: the network's usual one, less where they are smaller."""
    side = math.ceil(found.shorter_side / MULTIPLE) * MULTIPLE
    return usual if side == 0 else min(usual, max(side, MULTIPLE))


def data_text(found: Look, given: Path, *, size: int, pretrained: bool) -> str:
    """Return the sections `temperature`, `data` and `train` of a recipe.

    Args:
        found: what a look at the images found.
        given: the folder or table, as the user gave it.
        size: side of the images that the network sees.
        pretrained: whether the network starts from weights.
    """
    count = len(found.listing.part("train"))
    training = training_for(count, pretrained=pretrained)
    separator = found.listing.separator
    return _TEXT.format(
        name="csv" if found.listing.source.is_file() else "image_folder",
        root="".join(f"  {line}\n" for line in to_yaml({"root": str(given)}).splitlines()),
        labels="" if separator is None else _several(separator),
        validation="" if found.listing.part("validation") else VALIDATION,
        batch_size=training.batch_size,
        workers=4 if count >= 1000 else 0,
        scale=0.35 if pretrained else 0.2,
        size=size,
        augment="{operations: 2, magnitude: 9}",
        epochs=training.epochs,
        annealing=training.annealing,
        warmup=training.warmup,
        count=count,
        start=", from pretrained weights" if pretrained else ", from scratch",
        lr="1.0e-4" if pretrained else "1.0e-3",
        loss=("  label_smoothing: 0.1\n" if separator is None else "  loss: bce                 # or focal\n")
        + (UNEQUAL if found.unequal else ""),
    )


def _several(separator: str) -> str:
    """Return the lines that say that a row has several labels."""
    lines = to_yaml({"labels": "several", "args": {"separator": separator}}).splitlines()
    return "".join(f"  {line}\n" for line in lines)
