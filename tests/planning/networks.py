"""Small networks and recipes for the tests of planning and building."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe


class Residual(nn.Module):
    """Two convolutions and a shortcut, as in ResNet."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, in_channels, height, width]."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class TinyResNet(nn.Module):
    """A stem, two stages of two blocks each, a classifier; 8×8 images of one channel."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(width, width), Residual(width, width))
        self.layer2 = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 2 * width))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 1, height, width]."""
        x = self.layer2(self.layer1(torch.relu(self.stem(x))))
        return self.fc(x.mean((-2, -1)))


def recipe(layers: Sequence[Any] | Mapping[str, Any] = (), **others: Any) -> Recipe:
    """Return a recipe with these warehouses: a list makes one named `a`, a map several (lists or whole warehouses)."""
    named = layers if isinstance(layers, Mapping) else {"a": layers} if layers else {}
    warehouses = {
        name: found if isinstance(found, Mapping) else {"layers": list(found)} for name, found in named.items()
    }
    return load_recipe({"kw": 1, "name": "test", **({"warehouses": warehouses} if warehouses else {}), **others})
