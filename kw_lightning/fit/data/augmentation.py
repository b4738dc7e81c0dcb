"""Augmentations that are not torchvision's as they are: RandAugment of varying strength, or timm's, and erasing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kw_lightning.preprocessing import IMAGENET_MEAN
from kw_lightning.rand_augment import TimmWords, has_timm

SHARE = 0.45
"""Largest way that timm's RandAugment moves an image, as a share of its side; its `create_transform` says so."""


class RandAugment(v2.RandAugment):  # type: ignore[misc]  # torchvision is untyped
    """RandAugment whose strength varies from image to image (normal distribution, in steps of torchvision's scale).

    Each of the operations is applied with a probability, which is 1 in the paper and 0.5 in timm.
    """

    def __init__(self, operations: int = 2, magnitude: int = 9, std: float = 0.0, *, probability: float = 1.0) -> None:
        super().__init__(num_ops=operations, magnitude=magnitude)
        self.operations = operations
        self.mean_magnitude = magnitude
        self.std = std
        self.probability = probability

    def forward(self, *inputs: Any) -> Any:
        drawn = self.mean_magnitude + self.std * torch.randn(()).item()
        self.magnitude = round(min(max(drawn, 0.0), self.num_magnitude_bins - 1))
        if self.probability < 1:
            self.num_ops = int((torch.rand(self.operations) < self.probability).sum())
        return super().forward(*inputs)


class TimmRandAugment(nn.Module):
    """RandAugment as timm makes it, from NumPy's and Python's random numbers, for PIL images and uint8 [c, h, w].

    Args:
        words: as `rand-m9-mstd0.5-inc1`.
        mean: of each channel from 0 to 1, which fills what comes in from outside.
        interpolation: how images are turned and sheared.
    """

    def __init__(self, words: str, mean: tuple[float, ...], interpolation: str) -> None:
        super().__init__()
        from timm.data.transforms import str_to_pil_interp

        self.words = words
        self.fill = tuple(min(255, round(255 * value)) for value in mean)
        self.interpolation = str_to_pil_interp(interpolation)
        self._made: dict[tuple[int, int], Callable[[Image.Image], Image.Image]] = {}

    def forward(self, image: Any) -> Any:
        if not isinstance(image, Image.Image):
            return v2.functional.pil_to_tensor(self(v2.functional.to_pil_image(image)))
        side, channels = min(image.size), len(image.getbands())
        if (side, channels) not in self._made:
            self._made[side, channels] = self._make(side, channels)
        return self._made[side, channels](image)

    def _make(self, side: int, channels: int) -> Callable[[Image.Image], Image.Image]:
        from timm.data.auto_augment import rand_augment_transform

        fill = self.fill if channels == len(self.fill) else self.fill[:1] * channels
        settings = {
            "translate_const": int(side * SHARE),
            "img_mean": fill if channels > 1 else fill[0],
            "interpolation": self.interpolation,
        }
        made = rand_augment_transform(self.words, settings)
        for operation in made.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = partial(_posterize, operation.aug_fn)
        augment: Callable[[Image.Image], Image.Image] = made
        return augment


def _posterize(original: Callable[..., Image.Image], image: Image.Image, bits_to_keep: int, **options: Any) -> Any:
    """Return a black image where no bit is kept, at full strength: Pillow did so before it refused it."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return original(image, bits_to_keep, **options)


def rand_augment(options: Mapping[str, Any]) -> nn.Module | None:
    """Return what a section's `rand_augment` means; timm's own where it is said in timm's words and installed."""
    wanted = options.get("rand_augment", "none")
    if wanted == "none":
        return None
    if isinstance(wanted, Mapping):
        return RandAugment(**wanted)
    if not has_timm():
        return RandAugment(**TimmWords.read(wanted).for_torchvision())
    return TimmRandAugment(
        wanted, tuple(options.get("mean") or IMAGENET_MEAN), options.get("interpolation", "bilinear")
    )


def random_erasing(options: Mapping[str, Any]) -> v2.RandomErasing | None:
    """Return what a section's `random_erasing` means: a rectangle of zeros or, by `mode: pixel`, of normal noise."""
    wanted = options.get("random_erasing", 0)
    wanted = wanted if isinstance(wanted, Mapping) else {"probability": wanted}
    if not wanted["probability"]:
        return None
    # timm's sizes and shapes, which are those of the paper; torchvision rounds them
    value = "random" if wanted.get("mode") == "pixel" else 0
    return v2.RandomErasing(wanted["probability"], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=value)
