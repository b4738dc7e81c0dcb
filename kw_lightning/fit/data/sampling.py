"""Balanced sampling: which image stands at each place of an epoch, so that all classes come equally often.

The images are drawn with replacement, by torch's WeightedRandomSampler, from numbers that follow from seed and epoch
alone. Order, processes, workers and the place where a run is resumed have no part in it: they deal in places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

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
        self._drawn = lru_cache(maxsize=1)(self._draw)

    def at(self, epoch: int, places: Sequence[int]) -> list[int]:
        """Return the indices of the images at some places of an epoch."""
        drawn = self._drawn(epoch)
        return [drawn[place] for place in places]

    def _draw(self, epoch: int) -> list[int]:
        (seed,) = Draws(self.seed, epoch, [0]).seeds(STEP)
        generator = torch.Generator().manual_seed(seed)
        return list(WeightedRandomSampler(self.chances, len(self.chances), generator=generator))  # type: ignore[arg-type]
