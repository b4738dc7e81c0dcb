"""Random numbers for images: each image's follow from the seed, the epoch and its own index, and from nothing else.

Which worker, process or batch an image is in has no part in them, nor what was drawn before. So a run has the same
augmentation with any number of workers, and one that is resumed in the middle of an epoch goes on with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Draws:
    """The random numbers of the images of a batch, by NumPy's Philox, whose place in its sequence can be chosen.

    Args:
        seed: of the run.
        epoch: in which the numbers are new.
        indices: of the images in their data set.

    Notation:
        - b: images of the batch
    """

    def __init__(self, seed: int, epoch: int, indices: Sequence[int]) -> None:
        self.epoch = epoch
        self.indices = indices
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def uniform(self, step: int, count: int) -> Tensor:  # [b x count]
        """Return numbers from 0 to under 1 for one step of the transforms."""
        numbers = np.empty((len(self.indices), count), dtype=np.float32)
        for row, index in enumerate(self.indices):
            self._at(step, index).random(out=numbers[row], dtype=np.float32)
        return torch.from_numpy(numbers)

    def normal(self, step: int, shape: Sequence[int]) -> Tensor:  # [b x *shape]
        """Return standard normal numbers for one step of the transforms."""
        numbers = np.empty((len(self.indices), *shape), dtype=np.float32)
        for row, index in enumerate(self.indices):
            self._at(step, index).standard_normal(out=numbers[row], dtype=np.float32)
        return torch.from_numpy(numbers)

    def seeds(self, step: int) -> list[int]:
        """Return a seed for each image, for what draws by itself."""
        return [int(self._at(step, index).integers(2**32)) for index in self.indices]

    def _at(self, step: int, index: int) -> np.random.Generator:
        self._start["state"]["counter"][:] = (0, step, self.epoch, index)
        self._bits.state = self._start
        return self._generator


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Leave torch's, NumPy's and Python's random numbers at the end as they were at the beginning."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_everywhere(seed: int) -> None:
    """Seed the random numbers of the CPU that a transform may draw by itself."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would see to every GPU as well
    np.random.seed(seed)
    random.seed(seed)
