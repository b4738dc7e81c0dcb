"""What happens to one image between the data set and the network: the recipe's `data.train` and `data.eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from kw_lightning.errors import RecipeError
from kw_lightning.fit.data.augmentation import rand_augment, random_erasing
from kw_lightning.preprocessing import Preprocessing, resolved_section
from kw_lightning.recipe.types import Recipe


class Shift(v2.Transform):  # type: ignore[misc]
    """Move an image by up to `pixels` in each direction; zeros come in at the border."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        down, right = torch.randint(-self.pixels, self.pixels + 1, (2,)).tolist()
        return {"translate": [float(right), float(down)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.affine(inpt, angle=0.0, scale=1.0, shear=[0.0], **params)


def transform(recipe: Recipe, section: str, trained: Preprocessing | None = None) -> v2.Transform:
    """Return the transform of `data.train` or `data.eval`: a PIL image or uint8 tensor to float32 [c, h, w].

    What the section leaves open is the backbone's own, see `kw_lightning.preprocessing`.

    Args:
        recipe: the recipe.
        section: "train" or "eval".
        trained: what the network of a checkpoint was evaluated with, in the place of what the recipe would mean today.

    Raises:
        RecipeError: a crop without a size.
    """
    options = resolved_section(recipe, section)
    if trained is not None:
        options |= trained.to_dict()
    crop = options.get("crop", "none")
    if crop != "none" and options.get("size") is None:
        raise RecipeError(recipe.document.problem(f"data.{section}.crop", f'"{crop}" needs data.{section}.size'))
    return compose(options)


def evaluation_transform(steps: Preprocessing) -> v2.Transform:
    """Return the transform that a preprocessing stands for: a PIL image or uint8 tensor to float32 [c, h, w]."""
    return compose(steps.to_dict())


def compose(options: Mapping[str, Any]) -> v2.Transform:
    """Return the transform of a section's resolved keys.

    A PIL image is scaled and cut as one, by the same filter as torchvision and timm, and then made a tensor.
    """
    steps: list[nn.Module | None] = [
        *_cut(options),
        v2.RandomHorizontalFlip() if options.get("flip") else None,
        rand_augment(options),
        v2.ToImage(),
        Shift(options["shift"]) if options.get("shift") else None,
        v2.ToDtype(torch.float32, scale=True),
        v2.GaussianNoise(sigma=options["noise"], clip=False) if options.get("noise") else None,
        v2.Normalize(options["mean"], options["std"]) if options.get("mean") and options.get("std") else None,
        random_erasing(options),
        v2.ToPureTensor(),
    ]
    return v2.Compose([step for step in steps if step is not None])


def _cut(options: Mapping[str, Any]) -> list[v2.Transform | None]:
    """Return how an image comes to its size: scaled by its shorter side (or both sides), then cut."""
    size, resize, crop = options.get("size"), options.get("resize"), options.get("crop", "none")
    interpolation = v2.InterpolationMode(options.get("interpolation", "bilinear"))
    scaled = (resize, resize) if crop == "squash" else resize
    steps = [v2.Resize(scaled, interpolation=interpolation) if resize else None]
    if size is None:
        return steps
    if crop in ("center", "squash"):
        return [*steps, v2.CenterCrop(size)]
    if crop == "random":
        return [*steps, v2.RandomCrop(size, padding=options.get("padding"), pad_if_needed=True)]
    if crop == "random_resized":
        scale = tuple(options.get("scale", (0.08, 1.0)))
        return [*steps, v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation)]
    return [*steps, v2.Resize((size, size), interpolation=interpolation)]
