"""The authors' checkpoints on this machine: they cannot be fetched without a browser, so they are put into a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from kw_lightning.errors import RunError
from kw_lightning.nn.engine.cache import CacheError, cache_folder
from kw_lightning.published.checkpoint import BACKBONE, HEADS, backbone_tensors, load_published, misfit, read_published
from kw_lightning.published.keys import published_entries

log = logging.getLogger(__name__)

WORD = "published"
"""What `model.pretrained` says for them."""
SUFFIXES = (".pth", ".pt", ".tar", ".bin")
HOME = "https://github.com/OSVAI/KernelWarehouse"


def placed_folder() -> Path:
    """Return the folder that checkpoints have to be put into.

    Raises:
        RunError: there is no home folder.
    """
    try:
        return cache_folder() / WORD
    except CacheError as error:
        raise RunError(str(error)) from error


def load_placed(network: nn.Module, backbone: str, name: str) -> Path:
    """Fill a network with the weights of the checkpoint in the folder that fits it, at temperature 0.

    A classifier of another size than the checkpoint's keeps its start values, and so does the one beside a detector's
    checkpoint, which has a backbone alone.

    Args:
        network: as the recipe describes it.
        backbone: `torchvision/NAME` as in that recipe.
        name: of the recipe, for messages.

    Returns:
        The checkpoint.

    Raises:
        RunError: no checkpoint there fits, and why each does not; **or** a network that the authors have not published.
    """
    entries = published_entries(network, backbone)
    shapes = {entry.published: entry.shape for entry in entries}
    folder = placed_folder()
    found = folder.iterdir() if folder.is_dir() else ()
    refused = []
    for file in sorted(path for path in found if path.suffix in SUFFIXES):
        try:
            tensors, partial = _usable(read_published(file), shapes)
        except RunError as error:
            refused.append(str(error))
            continue
        fault = misfit(entries, tensors, backbone_only=partial)
        if fault:
            refused.append(f"{file.name} does not fit: {fault}")
            continue
        load_published(network, backbone, tensors, temperature=0.0, backbone_only=partial)
        if partial:
            log.warning("model.pretrained: %s has no classifier of this size, so it starts anew", file.name)
        return file
    seen = f"; there are: {'; '.join(refused)}" if refused else ""
    raise RunError(
        f"model.pretrained: {WORD}: put the authors' checkpoint of {name} into {folder}, under any name that ends in "
        f"{', '.join(SUFFIXES)}. They cannot be fetched without a browser: {HOME} links to them{seen}"
    )


def _usable(tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], bool]:
    """Return what of a checkpoint a network takes, and whether that lacks the classifier."""
    if any(key.startswith(BACKBONE) for key in tensors):
        return backbone_tensors(tensors), True
    resized = {
        key
        for key, tensor in tensors.items()
        if key.startswith(HEADS) and key in shapes and tensor.shape[:1] != shapes[key][:1]
    }
    return {key: tensor for key, tensor in tensors.items() if key not in resized}, bool(resized)
