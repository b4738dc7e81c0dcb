"""Which of the published configurations a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kw_lightning.builder import build
from kw_lightning.published.checkpoint import misfit
from kw_lightning.published.keys import published_entries
from kw_lightning.recipe import load_recipe

PUBLISHED = (
    "resnet18-kw-1d4x",
    "resnet18-kw-1d2x",
    "resnet18-kw-1x",
    "resnet18-kw-2x",
    "resnet18-kw-4x",
    "resnet50-kw-1d2x",
    "resnet50-kw-1x",
    "resnet50-kw-4x",
    "mobilenetv2-050-kw-1d2x",
    "mobilenetv2-050-kw-1x",
    "mobilenetv2-050-kw-4x",
    "mobilenetv2-100-kw-1d2x",
    "mobilenetv2-100-kw-1x",
    "mobilenetv2-100-kw-4x",
    "convnext-tiny-kw-1x",
)
"""The shipped recipes of the published configurations."""


def fitting_recipe(tensors: Mapping[str, Tensor], *, backbone_only: bool = False) -> str | None:
    """Return the published configuration whose network a checkpoint fits, None if it fits none."""
    for name in PUBLISHED:
        recipe = load_recipe(name)
        assert recipe.model is not None
        assert recipe.model.backbone is not None
        with torch.device("meta"):
            network = build(recipe)
        if not misfit(published_entries(network, recipe.model.backbone), tensors, backbone_only=backbone_only):
            return name
    return None
