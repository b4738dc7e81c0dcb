"""Images of a network's own recipe: training images to calibrate with, evaluation images to measure on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kw_lightning.errors import RunError
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.sets import even_subset
from kw_lightning.fit.data.transforms import evaluation_transform
from kw_lightning.inference.saving import SavedNetwork

BATCH = 64


def calibration_images(saved: SavedNetwork, count: int, *, allow_python: Sequence[str] = ()) -> Iterator[Tensor]:
    """Yield batches [batch, channels, height, width] of training images, as many of each class, not augmented.

    Raises:
        RunError: the recipe names no images, **or** they are not there.
    """
    samples = even_subset(images_of(saved, allow_python).parts["train"].samples, count)
    transform = evaluation_transform(saved.preprocessing)
    indices = range(min(count, len(samples)))  # type: ignore[arg-type]
    for start in range(0, len(indices), BATCH):
        yield torch.stack([transform(samples[index][0]) for index in indices[start : start + BATCH]])


def evaluation_images(saved: SavedNetwork, *, allow_python: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of validation images, or of test images where none validate, and their classes.

    Raises:
        RunError: the recipe names no images, they are not there, **or** there are neither.
    """
    data = images_of(saved, allow_python)
    part = next((part for part in ("val", "test") if part in data.parts), None)
    if part is None:
        raise RunError(f"the data of {saved.recipe.name} has neither a validation nor a test part to compare on")
    yield from data.evaluation_loader(part)


def images_of(saved: SavedNetwork, allow_python: Sequence[str]) -> ImageData:
    data = data_module(saved.recipe, allow_python=allow_python, trained=saved.preprocessing)
    if not isinstance(data, ImageData):
        raise RunError(f"the recipe {saved.recipe.name} has a data module of its own; a named data set is needed here")
    return data
