"""Convolutions and problems that several tests of the engine share."""

from __future__ import annotations

import dataclasses
import math

import torch

from kw_lightning.nn.engine import Convolution
from kw_lightning.nn.engine.problem import Problem

# (in, out, kernel, map at 224², stride, cell, cells, groups) of layers in the shipped zoo
LAYERS = {
    "resnet18 layer1": (64, 64, 3, 56, 1, (64, 64), 56, 1),
    "resnet18 layer2.0.conv1": (64, 128, 3, 56, 2, (64, 64), 56, 1),
    "resnet18 layer2": (128, 128, 3, 28, 1, (128, 128), 47, 1),
    "resnet18 layer3": (256, 256, 3, 14, 1, (256, 256), 47, 1),
    "resnet18 layer3.downsample": (128, 256, 1, 28, 2, (128, 128), 47, 1),
    "resnet18 layer4.0.conv1": (256, 512, 3, 14, 2, (256, 256), 47, 1),
    "resnet18 layer4": (512, 512, 3, 7, 1, (512, 512), 27, 1),
    "resnet50 layer1 expand": (64, 256, 1, 56, 1, (64, 64), 87, 1),
    "resnet50 layer2 reduce": (512, 128, 1, 28, 1, (128, 128), 104, 1),
    "resnet50 layer3 expand": (256, 1024, 1, 14, 1, (256, 256), 138, 1),
    "resnet50 layer4 reduce": (2048, 512, 1, 7, 1, (512, 512), 47, 1),
    "mobilenetv2 project": (144, 24, 1, 56, 1, (8, 24), 78, 1),
    "mobilenetv2 depthwise": (144, 144, 3, 56, 1, (48, 1), 54, 144),
    "convnext depthwise": (96, 96, 7, 56, 1, (96, 1), 147, 96),
    "regnet grouped": (208, 208, 3, 14, 1, (208, 8), 54, 26),
    "convnext expand": (384, 1536, 1, 14, 1, (384, 384), 72, 1),
}


def convolution(name: str) -> Convolution:
    """Return the geometry of one of `LAYERS`."""
    inputs, outputs, kernel, _, stride, cell, _, groups = LAYERS[name]
    return Convolution(
        (outputs, inputs // groups, kernel, kernel),
        (*cell, 1, 1),
        (stride, stride),
        (kernel // 2, kernel // 2),
        (1, 1),
        groups,
    )


def problem(
    name: str,
    batch: int,
    size: int = 224,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    backward: bool = False,
) -> Problem:
    """Return the problem of one of `LAYERS` in a network whose input is of a size."""
    side = math.ceil(LAYERS[name][3] * size / 224)
    return Problem(convolution(name), batch, (side, side), LAYERS[name][6], dtype, torch.device(device), backward)


def suited(path: str, convolution: Convolution) -> Convolution:
    """Return the convolution, for the paths of grouped ones in two groups, or with every output channel by itself."""
    if path.endswith("by_group"):
        channels, *others = convolution.kernel_shape
        return dataclasses.replace(convolution, kernel_shape=(2 * channels, *others), groups=2)
    if not path.endswith("depthwise"):
        return convolution
    (channels, _, *kernel), (cell, *_) = convolution.kernel_shape, convolution.cell_shape
    ones = (1,) * (convolution.dimensions + 1)
    return dataclasses.replace(
        convolution, kernel_shape=(channels, 1, *kernel), cell_shape=(cell, *ones), groups=channels
    )
