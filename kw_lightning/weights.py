"""Files of weights that other programs have written, without the wrappers and prefixes that training leaves on them."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kw_lightning.errors import RunError, first_line

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, of torch.compile, and of a LightningModule
DEPTH = 4  # of wrappers within each other


def read_weights(path: Path, *, part: str | None = None, known: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a file by name; no code of the file is run.

    Args:
        path: safetensors, **or** what `torch.save` wrote: a state_dict alone or in a checkpoint, where it is called
            "state_dict" or "model", or is the only one.
        part: what the weights are called in the checkpoint, if others are wanted.
        known: the network's own names: what these begin with is no prefix.

    Raises:
        RunError: no such file, a damaged one, **or** one that does not hold the weights.
    """
    try:
        content = _read(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail in any way
        why = first_line(error) if isinstance(error, (UnpicklingError, SafetensorError)) else type(error).__name__
        cure = "torch.save(network.state_dict(), FILE) writes one"
        raise RunError(f"{path}: not a checkpoint, or a damaged one: {why}; {cure}") from error
    if part is not None:
        content = content.get(part) if isinstance(content, Mapping) else None
    weights = _unwrapped(content)
    if not _are_weights(weights):
        where = f"neither by itself nor under {', '.join(WRAPPERS)}" if part is None else f"under {part}"
        raise RunError(f"{path}: found no state_dict of tensors {where}")
    return _without_prefixes(dict(weights), frozenset(known))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # Arguments of a command line are plain data, and in the checkpoints of torchvision's and timm's own trainings.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _are_weights(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())


def _unwrapped(content: Any) -> Any:
    """Return what the wrappers hold, or what is there where there are none."""
    for _ in range(DEPTH):
        if not isinstance(content, Mapping) or _are_weights(content):
            break
        inner = [content[name] for name in WRAPPERS if name in content]
        only = [value for value in content.values() if value and _are_weights(value)]
        if not inner and len(only) != 1:
            break
        content = [*inner, *only][0]
    return content


def _without_prefixes(weights: dict[str, Tensor], known: frozenset[str]) -> dict[str, Tensor]:
    while weights and known.isdisjoint(weights):
        prefix = next((each for each in PREFIXES if all(key.startswith(each) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


__all__ = ["read_weights"]
