"""RandAugment in timm's words, `rand-m9-mstd0.5-inc1`: what they mean, and what becomes of them without timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from kw_lightning.recipe.types import Recipe

LEVELS = 3
"""Steps of torchvision's scale of strength (0 to 30) in one of timm's (0 to 10)."""

MOST = 10
"""Strength at which timm's words end unless their `mmax` says another."""


@dataclass(frozen=True)
class TimmWords:
    """What timm's words say of RandAugment.

    Attributes:
        magnitude, std: strength and its spread between images, 0 to 10.
        operations: drawn for each image.
        probability: of each of them to be applied.
    """

    magnitude: float = 10
    std: float = 0.0
    operations: int = 2
    probability: float = 0.5

    @classmethod
    def read(cls, text: str) -> TimmWords:
        """Read the words, which the schema has checked; `mmax` and `inc` mean nothing without timm."""
        names = {"m": "magnitude", "mstd": "std", "n": "operations", "p": "probability"}
        pairs = re.findall(r"-([a-z]+)([0-9.]+)", text)
        values = {names[key]: int(value) if key == "n" else float(value) for key, value in pairs if key in names}
        return cls(**values)  # type: ignore[arg-type]

    def for_torchvision(self) -> dict[str, Any]:
        """Return the nearest arguments of our RandAugment over torchvision's operations."""
        return {
            "operations": self.operations,
            "magnitude": min(round(self.magnitude * LEVELS), 30),
            "std": self.std * LEVELS,
            "probability": self.probability,
        }


@cache
def has_timm() -> bool:
    """Tell whether timm is installed, without importing it."""
    return find_spec("timm") is not None


def difference(recipe: Recipe) -> str | None:
    """Return who computes a recipe's RandAugment in timm's words, and what differs where timm is not installed."""
    options: Mapping[str, Any] = recipe.data.train if recipe.data is not None else {}
    words = options.get("rand_augment", "none")
    if not isinstance(words, str) or words == "none":
        return None
    if has_timm():
        cut = TimmWords.read(words).magnitude > MOST and "-mmax" not in words
        return f"{words}, by timm" + (f", as m{MOST}: more needs a larger mmax, as -mmax30" if cut else "")
    own = TimmWords.read(words).for_torchvision()
    return (
        f"{words} by torchvision, since timm is not installed: strength {own['magnitude']} of 30, spread "
        f"{own['std']:g}; the ranges of its operations differ, and posterize and solarize are not increasing"
    )
