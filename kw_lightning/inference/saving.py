"""A trained network as a folder that other programs can open: weights, recipe, preprocessing, class names, a card.

`config.json` holds the hash of every other file but the card, so that a changed file is refused; nothing in the folder
is code, and reading it runs none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from kw_lightning.builder import build
from kw_lightning.callbacks.layout import misfits
from kw_lightning.errors import RunError, first_line, listed, mistake
from kw_lightning.inference.packing import packed, unpacked
from kw_lightning.nn import KWLinear
from kw_lightning.paths import whole
from kw_lightning.planning import Plan, plan
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.locking import lock_text
from kw_lightning.recipe.types import Recipe
from kw_lightning.versions import OWN, version_of

FORMAT = "kw_lightning/1"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECIPE = "recipe.lock.yaml"
PREPROCESSING = "preprocess.json"
CLASSES = "classes.json"
CARD = "README.md"
HASHED = (WEIGHTS, RECIPE, PREPROCESSING, CLASSES)
MAX_TEXT = 64 * 2**20
"""Bytes of a JSON file that are read at the most."""


@dataclass(frozen=True)
class SavedNetwork:
    """What a folder holds.

    Attributes:
        network: with its weights, in evaluation mode, on the CPU.
        recipe: resolved.
        preprocessing: what turns an image into the network's input.
        classes: names of the network's outputs, in their order.
        several: whether an image may be of several classes at once.
        plan: what the network was built by, where it was built here.
    """

    network: nn.Module
    recipe: Recipe
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    several: bool = False
    plan: Plan | None = field(default=None, compare=False)


def write_folder(saved: SavedNetwork, folder: Path, card: str, *, eight_bits: bool = False) -> None:
    """Write a network to a folder, which is made; files of an earlier one there are replaced.

    Args:
        eight_bits: write weights in eight bits, see `packed`.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / CONFIG) as config:
            place = config.parent
            tensors = _tensors(saved.network)
            save_file(packed(tensors) if eight_bits else tensors, place / WEIGHTS, metadata={"format": "pt"})
            (place / RECIPE).write_text(lock_text(saved.recipe), encoding="utf-8")
            shutil.copymode(place / RECIPE, place / WEIGHTS)  # safetensors lets the owner alone read its files
            _write_json(place / PREPROCESSING, saved.preprocessing.to_dict())
            _write_json(place / CLASSES, list(saved.classes))
            (place / CARD).write_text(card, encoding="utf-8")
            _write_json(
                config,
                {
                    "format": FORMAT,
                    "library": "kw_lightning",
                    "version": version_of(OWN),
                    "task": "multi-label-image-classification" if saved.several else "image-classification",
                    "sha256": {name: _hash(place / name) for name in HASHED},
                },
            )
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            folder.rmdir()  # where it was made for this
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise RunError(f"{folder} cannot be written: {reason}") from error


def read_folder(folder: Path, *, allow_python: Sequence[str] = ()) -> SavedNetwork:
    """Read a folder that `write_folder` made.

    Args:
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: no such folder, a file that is missing, changed or damaged, **or** weights that do not fit.
        RecipeError: a recipe that cannot be used here.
    """
    config = _read_json(folder / CONFIG, dict)
    if config.get("format") != FORMAT:
        raise RunError(f"{folder / CONFIG}: {mistake(config.get('format'), [FORMAT], what='the format')}")
    hashes = config.get("sha256")
    for name in HASHED:
        expected = hashes.get(name) if isinstance(hashes, Mapping) else None
        if not (folder / name).is_file():
            raise RunError(f"{folder}: {name} is missing")
        if _hash(folder / name) != expected:
            raise RunError(f"{folder / name} was changed after it was saved: its hash is not that of {CONFIG}")
    recipe = load_recipe(folder / RECIPE)
    classes = _read_json(folder / CLASSES, list)
    try:
        preprocessing = Preprocessing.from_dict(_read_json(folder / PREPROCESSING, dict))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / PREPROCESSING}: not a preprocessing: {first_line(error)}") from error
    planned = plan(recipe, allow_python=allow_python)
    network = build_network(planned, allow_python=allow_python)
    load_weights(network, _read_weights(folder / WEIGHTS), folder / WEIGHTS)
    several = str(config.get("task", "")).startswith("multi-label")
    return SavedNetwork(network.eval(), recipe, preprocessing, tuple(map(str, classes)), several, planned)


def build_network(recipe: Recipe | Plan, *, allow_python: Sequence[str] = ()) -> nn.Module:
    """Make the network of a recipe for weights that come afterwards; no random number is taken from the caller's."""
    with torch.random.fork_rng(devices=[]):
        return build(recipe, allow_python=allow_python, pretrained=False)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Fill a network with weights that must fit it exactly.

    Raises:
        RunError: keys that are missing, left over or of another shape.
    """
    found = misfits(network, weights)
    if found:
        raise RunError(f"{source}: the weights do not fit the recipe beside them: {listed(found, between='; ')}")
    network.load_state_dict(dict(weights))


def class_names(network: nn.Module) -> tuple[str, ...]:
    """Return names for a network's outputs where none are known: ImageNet's of a thousand, else numbers."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | KWLinear)}
    # the attention of a dynamic layer has linear layers of its own
    outputs = [layer.out_features for name, layer in layers.items() if "attention" not in name.split(".")][-1:]
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names) if outputs == [len(names)] else tuple(map(str, range(sum(outputs))))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return unpacked(load_file(path))
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: not a safetensors file, or a damaged one: {first_line(error)}") from error


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path, kind: type) -> Any:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise RunError(f"{path}: larger than {MAX_TEXT:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.parent} is no saved network: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(data, kind):
        raise RunError(f"{path}: {mistake(data, 'a list' if kind is list else 'a map')}")
    return data


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["SavedNetwork", "build_network", "class_names", "load_weights", "read_folder", "write_folder"]
