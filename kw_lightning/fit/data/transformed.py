"""A data set with a transform for its images, read in whole batches, and the loader that hands these out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from kw_lightning.callbacks.resume import ResumableDataLoader
from kw_lightning.errors import RunError
from kw_lightning.fit.data.batches import batchwise
from kw_lightning.fit.data.draws import Draws, own_random_numbers, seed_everywhere
from kw_lightning.fit.data.sampling import BalancedPlaces
from kw_lightning.fit.data.sets import Images, Samples, file_of, whole

log = logging.getLogger(__name__)

NONE_READ = "data: no image can be read"

Batch = tuple[Tensor, Tensor]
"""Images [b, c, h, w] and classes [b]; with mixup or several labels the classes' shares [b, classes]."""


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


def as_it_is(batch: Batch) -> Batch:
    """Return a batch, which is put together already."""
    return batch
