"""The authors' checkpoints: read into a network of ours, and written from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from kw_lightning.errors import RunError, listed
from kw_lightning.nn import set_temperature
from kw_lightning.paths import writable
from kw_lightning.published.keys import CELLS, Entry, published_entries
from kw_lightning.weights import read_weights

AVERAGED = "model_ema"
BACKBONE = "backbone."
"""What the authors' detectors call the part that this package has."""
HEADS = ("fc.", "classifier.", "head.", "norm.")
"""Of the authors' keys: what a detector's backbone does not have."""


@dataclass(frozen=True)
class Misfit:
    """What keeps a checkpoint from fitting a network, by the authors' keys.

    Attributes:
        missing, left: keys that only the network and that only the checkpoint has.
        shapes: key → (shape in the checkpoint, in the network).
    """

    missing: tuple[str, ...]
    left: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.left or self.shapes)

    def __str__(self) -> str:
        differ = [f"{key}: {list(found)} instead of {list(wanted)}" for key, (found, wanted) in self.shapes.items()]
        parts = (("missing", self.missing), ("left over", self.left), ("of another shape", differ))
        return "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in parts if names)


def read_published(path: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Return the tensors of an authors' checkpoint, without wrappers and prefixes; no code of the file is run.

    Args:
        averaged: take the averaged weights (`model_ema`) instead of the last ones.

    Raises:
        RunError: no such file, a damaged one, **or** one that holds no tensors.
    """
    return read_weights(path, part=AVERAGED if averaged else None)


def backbone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors of a checkpoint of one of the authors' detectors, or of the backbone alone."""
    inside = {key.removeprefix(BACKBONE): value for key, value in tensors.items() if key.startswith(BACKBONE)}
    found = inside or dict(tensors)
    # Their ConvNeXt has a norm behind every stage there, which a classifier has not.
    return {key: value for key, value in found.items() if not key.startswith(tuple(f"norm{i}." for i in range(4)))}


def misfit(entries: Sequence[Entry], tensors: Mapping[str, Tensor], *, backbone_only: bool = False) -> Misfit:
    """Return what does not fit between a network's entries and a checkpoint's tensors; nothing if all does."""
    wanted = {entry.published: entry.shape for entry in entries}
    missing = [key for key in wanted if key not in tensors]
    if backbone_only:
        missing = [key for key in missing if not key.startswith(HEADS)]
    return Misfit(
        tuple(missing),
        tuple(key for key in tensors if key not in wanted),
        {
            key: (tuple(tensors[key].shape), shape)
            for key, shape in wanted.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        },
    )


def load_published(
    network: nn.Module,
    backbone: str,
    tensors: Mapping[str, Tensor],
    *,
    temperature: float = 0.0,
    backbone_only: bool = False,
) -> None:
    """Fill a network with the weights of an authors' checkpoint.

    Args:
        network: of the recipe that the checkpoint was trained with.
        backbone: `torchvision/NAME` as in that recipe.
        tensors: see `read_published`.
        temperature: τ, which the authors' checkpoints do not hold; 0 at the end of a training.
        backbone_only: the classifier may be missing and then keeps its weights.

    Raises:
        RunError: keys that are missing, left over, or of another shape, all of them counted.
    """
    entries = published_entries(network, backbone)
    fault = misfit(entries, tensors, backbone_only=backbone_only)
    if fault:
        raise RunError(f"the checkpoint does not fit the network: {fault}")
    own = network.state_dict()
    with torch.no_grad():
        for entry in entries:
            if entry.published in tensors:
                own[entry.ours].copy_(tensors[entry.published].reshape(own[entry.ours].shape))
    set_temperature(network, temperature)


def to_published(network: nn.Module, backbone: str) -> dict[str, Tensor]:
    """Return a network's tensors under the authors' keys and in their shapes, cells first, as they write them."""
    own = network.state_dict()
    entries = published_entries(network, backbone)
    ordered = sorted(entries, key=lambda entry: _cells_first(entry.published))
    return {entry.published: own[entry.ours].detach().cpu().reshape(entry.shape).clone() for entry in ordered}


def write_published(network: nn.Module, backbone: str, path: Path) -> None:
    """Write a network as a checkpoint that the authors' code loads (`{"model": …}`).

    Raises:
        RunError: a network that the authors have not published, **or** a file that cannot be written.
    """
    made = BytesIO()  # on a full disk its writer would say no more than its own state
    torch.save({"model": to_published(network, backbone)}, made)
    with writable(path) as partial:
        partial.write_bytes(made.getbuffer())


def _cells_first(key: str) -> int:
    name, _, number = key.rpartition(".")
    return int(number) if name == CELLS else 1 << 30
