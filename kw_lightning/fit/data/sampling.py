"""Which image stands at each place of an epoch, by numbers that follow from seed and epoch alone.

Balanced sampling draws images with replacement, by torch's WeightedRandomSampler, all classes as often.
Order, processes, workers and the place where a run is resumed have no part in it: they deal in places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, WeightedRandomSampler

from kw_lightning.fit.data.draws import Draws

STEP = 1 << 33
"""Sets these numbers apart from those of the transforms, which are numbered from 0."""


class BalancedPlaces:
    """The image at each place of an epoch, as many places as there are images.

    Args:
        targets: the class of each image [n].
        seed: of the run.
    """

    def __init__(self, targets: Tensor, seed: int) -> None:
        self.seed = seed
        self.chances = 1 / torch.bincount(targets).double()[targets]
        self._drawn: tuple[int, list[int]] = (-1, [])  # the last epoch

    def at(self, epoch: int, places: Sequence[int]) -> list[int]:
        """Return the indices of the images at some places of an epoch."""
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        drawn = self._drawn[1]
        return [drawn[place] for place in places]

    def _draw(self, epoch: int) -> list[int]:
        (seed,) = Draws(self.seed, epoch, [0]).seeds(STEP)
        generator = torch.Generator().manual_seed(seed)
        return list(WeightedRandomSampler(self.chances, len(self.chances), generator=generator))  # type: ignore[arg-type]


class EpochSampler(RandomSampler):
    """A random order that follows from a seed and the epoch alone.

    Lightning tells it the epoch, and puts its distributed sampler in its place where there are several devices. An
    order drawn from a generator would begin anew in a run that is resumed between two epochs.
    """

    def __init__(self, images: Sized, seed: int) -> None:
        super().__init__(images)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(len(self), generator=generator).tolist()
