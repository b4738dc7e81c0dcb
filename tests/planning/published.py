"""The published configurations: what is recorded of them, and their names in torchvision's networks."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
RECORDED = sorted(path.stem for path in PUBLISHED.glob("kw*.json"))

ATTENTION = {"fc1": "reduce", "norm1": "norm", "fc2": "expand", "fc3": "basis"}
NORMS = {"norm": "classifier.0", "head": "classifier.2"}  # of ConvNeXt


def recipe_name(recorded: str) -> str:
    """Return the shipped recipe of a recorded configuration: `kw1x_resnet18` → `resnet18-kw-1x`."""
    budget, _, network = recorded.removeprefix("kw").partition("_")
    return f"{network.replace('_', '-')}-kw-{budget}"


def our_name(published: str) -> str:
    """Return a published layer's name in torchvision's network."""
    if published == "classifier.1.conv":
        return "classifier.1"
    parts = published.split(".")
    if parts[0] == "downsample_layers":  # ConvNeXt: stem 0.0, then downsampling in front of every stage
        return "features.0.0" if parts[1] == "0" else f"features.{2 * int(parts[1])}.1"
    if parts[0] == "stages":
        index = {"dwconv": 0, "pwconv1": 3, "pwconv2": 5}[parts[3]]
        return f"features.{2 * int(parts[1]) + 1}.{parts[2]}.block.{index}"
    return published


def recorded_value(key: str, shape: list[int]) -> Tensor:
    """Return the weight that the archive was recorded with (README.md of the archive)."""
    draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    name = key.rpartition(".")[2]
    if name == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    if name == "running_var":
        value = 1 + 0.1 * np.abs(draw)
    elif name in ("running_mean", "bias", "gamma"):
        value = 0.1 * draw
    elif len(shape) <= 1:
        value = 1 + 0.1 * draw
    else:
        value = draw * math.sqrt(2 / math.prod(shape[1:]))
    return torch.as_tensor(value)


def our_key(key: str, layers: set[str]) -> str:
    """Return the key in our network of a published checkpoint's key."""
    parts = key.split(".")
    if "attention" in parts:
        at = parts.index("attention")
        rest = parts[at + 1 :]
        return ".".join([our_name(".".join(parts[:at])), "attention", ATTENTION.get(rest[0], rest[0]), *rest[1:]])
    module, _, name = key.rpartition(".")
    if name == "gamma":
        return f"features.{2 * int(parts[1]) + 1}.{parts[2]}.layer_scale"
    if parts[0] == "stages" and parts[3] == "norm":
        return f"features.{2 * int(parts[1]) + 1}.{parts[2]}.block.2.{name}"
    if parts[0] == "downsample_layers" and module not in layers:
        return f"features.{2 * int(parts[1])}.{parts[2]}.{name}"
    if module == "classifier":
        return f"classifier.1.{name}"
    return f"{NORMS.get(module) or our_name(module)}.{name}"
