"""Which training images validate: drawn once, evenly from every class, and kept with the run by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from kw_lightning.errors import RunError

SPLIT = "kw_lightning_split"
"""Key of a checkpoint: what `Split.to_dict` returns, or None where no images were drawn."""

Name = str | int
"""What an image is known by in another process: its file beside the root of the data, or its place in the data set."""


@dataclass(frozen=True)
class Split:
    """The training images that validate.

    Attributes:
        validation: their names, in the data set's order.
        seed: that they were drawn by.
        share: of each class's images.
        alone: classes with a single image, which trains.
    """

    validation: tuple[Name, ...]
    seed: int
    share: Fraction
    alone: tuple[int, ...] = field(default=(), compare=False)

    def places(self, names: Sequence[Name]) -> tuple[list[int], list[int]]:
        """Return the places of the images that train, and of those that validate; names that are not there are none."""
        held = frozenset(self.validation)
        train: list[int] = []
        validation: list[int] = []
        for place, name in enumerate(names):
            (validation if name in held else train).append(place)
        return train, validation

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a checkpoint or a JSON file."""
        return {"validation": list(self.validation), "seed": self.seed, "share": str(self.share)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Split:
        """Return what `to_dict` wrote down.

        Raises:
            RunError: anything else.
        """
        names, seed, share = data.get("validation"), data.get("seed"), data.get("share")
        named = isinstance(names, list) and all(type(name) in (int, str) for name in names)
        try:
            if named and type(seed) is int and isinstance(share, str):
                return cls(tuple(names or ()), seed, Fraction(share))
        except (ValueError, ZeroDivisionError):
            pass
        raise RunError("the checkpoint is damaged, or not of kw-fit: it does not say which images validated")


NOTHING = Split((), 0, Fraction(0))
"""Takes no image away from training."""


def split_of(state: Mapping[str, Any]) -> Split | None:
    """Return which images validated where a checkpoint is from; None where it does not say, or where none were drawn.

    Raises:
        RunError: it says what kw-fit does not write.
    """
    found = state.get(SPLIT)
    return Split.from_dict(found) if isinstance(found, Mapping) else None


def draw(names: Sequence[Name], targets: Sequence[int], share: Fraction, seed: int) -> Split:
    """Draw the images that validate: the share of every class, of two images or more at least one and never all.

    Args:
        names: of the images.
        targets: their classes.
        share: over 0 and under 1.
        seed: the same seed draws the same of the same images, whatever was drawn before.
    """
    places = defaultdict(list)
    for place, target in enumerate(targets):
        places[target].append(place)
    generator = torch.Generator().manual_seed(seed)
    held: list[int] = []
    for target in sorted(places):
        order = torch.randperm(len(places[target]), generator=generator).tolist()
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held += [places[target][index] for index in order[:count]]
    alone = tuple(target for target in sorted(places) if len(places[target]) == 1)
    return Split(tuple(names[place] for place in sorted(held)), seed, share, alone)
