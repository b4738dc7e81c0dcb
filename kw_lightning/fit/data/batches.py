"""Transforms of whole batches of images of one size: one call for a batch, and for every image its own numbers.

torchvision's random transforms draw once for all that they are given. What is cheap to do with numbers for each image
is done so here, to the same distribution; other random transforms are taken image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from kw_lightning.fit.data.draws import Draws, own_random_numbers, seed_everywhere
from kw_lightning.fit.data.transforms import Shift

BatchStep = Callable[[Tensor, Draws, int], Tensor]
"""Function of images [b, c, h, w], their random numbers and the step's number; returns images [b, c, h', w']."""

ALIKE = {v2.ToImage, v2.Resize, v2.CenterCrop, v2.ToDtype, v2.Normalize, v2.ToPureTensor}
"""Transforms that do the same with every image, in a batch or alone."""

ATTEMPTS = 10
"""How often torchvision draws a rectangle to erase before it gives up."""


def batchwise(steps: v2.Compose) -> list[BatchStep]:
    """Return a transform of single images as steps that take batches."""
    return [_batchwise(step) for step in steps.transforms]


def _batchwise(step: v2.Transform) -> BatchStep:
    # No closure, because workers that are not forked get it pickled; a subclass may do anything.
    return partial(_alike if type(step) in ALIKE else BATCHED.get(type(step), _one_by_one), step)


def _alike(step: v2.Transform, images: Tensor, draws: Draws, number: int) -> Tensor:
    return step(images)


def _one_by_one(step: v2.Transform, images: Tensor, draws: Draws, number: int) -> Tensor:
    changed = []
    with own_random_numbers():
        for image, seed in zip(images, draws.seeds(number), strict=True):
            seed_everywhere(seed)
            changed.append(step(image))
    return torch.stack(changed)


def _flip(step: v2.RandomHorizontalFlip, images: Tensor, draws: Draws, number: int) -> Tensor:
    chosen = draws.uniform(number, 1) < step.p  # [b x 1]
    return torch.where(chosen[..., None, None], images.flip(-1), images)


def _crop(step: v2.RandomCrop, images: Tensor, draws: Draws, number: int) -> Tensor:
    height, width = step.size
    left, right, top, bottom = step.padding or (0, 0, 0, 0)
    if step.pad_if_needed:
        lacking = max(height - images.shape[-2] - top - bottom, 0), max(width - images.shape[-1] - left - right, 0)
        top, bottom, left, right = top + lacking[0], bottom + lacking[0], left + lacking[1], right + lacking[1]
    padded = v2.functional.pad(images, [left, top, right, bottom], fill=step.fill, padding_mode=step.padding_mode)
    room = torch.tensor([padded.shape[-2] - height + 1, padded.shape[-1] - width + 1])
    corner = (draws.uniform(number, 2) * room).long()  # [b x 2]
    return _windows(padded, corner, height, width)


def _shift(step: Shift, images: Tensor, draws: Draws, number: int) -> Tensor:
    corner = (draws.uniform(number, 2) * (2 * step.pixels + 1)).long()
    return _windows(functional.pad(images, [step.pixels] * 4), corner, *images.shape[-2:])


def _windows(images: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """Return the window of each image whose upper left corner (row, column) is given: [b x c x height x width]."""
    rows = corner[:, :1] + torch.arange(height)  # [b x height]
    columns = corner[:, 1:] + torch.arange(width)  # [b x width]
    image, channel = torch.arange(len(images)), torch.arange(images.shape[1])
    return images[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _noise(step: v2.GaussianNoise, images: Tensor, draws: Draws, number: int) -> Tensor:
    noisy = images + step.mean + step.sigma * draws.normal(number, images.shape[1:])
    return noisy.clamp(0, 1) if step.clip else noisy


def _erase(step: v2.RandomErasing, images: Tensor, draws: Draws, number: int) -> Tensor:
    height, width = images.shape[-2:]
    numbers = draws.uniform(number, 3 + 2 * ATTEMPTS)  # whether, and where; then shapes, of which the first that fits
    chosen, place, shapes = numbers[:, 0] < step.p, numbers[:, 1:3], numbers[:, 3:].unflatten(1, (ATTEMPTS, 2))
    area = height * width * (step.scale[0] + shapes[..., 0] * (step.scale[1] - step.scale[0]))
    least, most = (math.log(ratio) for ratio in step.ratio)
    ratio = torch.exp(least + shapes[..., 1] * (most - least))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1).round()  # [b x attempts x 2]
    fits = (sides < torch.tensor([height, width])).all(dim=-1)
    first = fits.int().argmax(dim=1)
    side = sides[torch.arange(len(images)), first]  # [b x 2]
    corner = (place * (torch.tensor([height, width]) - side + 1)).floor()
    rows = _between(torch.arange(height), corner[:, :1], side[:, :1])  # [b x height]
    columns = _between(torch.arange(width), corner[:, 1:], side[:, 1:])
    erased = (chosen & fits.any(dim=1))[:, None, None] & rows[:, :, None] & columns[:, None, :]
    if step.value is None:
        value = draws.normal(number + ERASED, images.shape[1:])
    else:
        value = torch.tensor(step.value)[:, None, None]
    return torch.where(erased[:, None], value.to(images.dtype), images)


ERASED = 1 << 32
"""Added to a step's number for a second sequence of numbers: what takes the place of erased pixels."""


def _between(positions: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (positions >= start) & (positions < start + length)


BATCHED: dict[type[v2.Transform], Callable[[Any, Tensor, Draws, int], Tensor]] = {
    v2.RandomHorizontalFlip: _flip,
    v2.RandomCrop: _crop,
    v2.RandomErasing: _erase,
    v2.GaussianNoise: _noise,
    Shift: _shift,
}
"""Random transforms with a form of their own for batches."""
