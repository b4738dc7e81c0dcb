"""A checkpoint of any LightningModule with KWCallback in the form that `kw-fit` writes, to be used as one of these.

The network's weights lie there under whatever name the LightningModule gives it, and the recipe's layers have names of
the LightningModule or of a part of it: both become names of the network alone. No code of the checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.builder import make_static
from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.errors import RunError
from kw_lightning.preprocessing import PREPROCESSING, Preprocessing
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe
from kw_lightning.recipe.variables import escape

NETWORK = "network."
"""What a checkpoint of `kw-fit` puts before the names of its network's weights."""
COMPILED = "_orig_mod."
"""What torch.compile adds to them."""


def is_foreign(state: Any) -> bool:
    """Tell whether a checkpoint is of a LightningModule with KWCallback, and not of `kw-fit`."""
    if not isinstance(state, Mapping) or not isinstance(state.get(KEY), list):
        return False
    parameters, weights = state.get("hyper_parameters"), state.get("state_dict")
    of_kw_fit = isinstance(parameters, Mapping) and isinstance(parameters.get("recipe"), Mapping)
    return not (of_kw_fit and isinstance(weights, Mapping) and all(str(key).startswith(NETWORK) for key in weights))


def as_of_kw_fit(
    state: Mapping[str, Any], path: Path, overrides: Sequence[str] = (), *, allow_python: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a checkpoint of a LightningModule with KWCallback as if `kw-fit` had written it.

    Args:
        state: the checkpoint.
        path: its file, for messages.
        overrides: changes to the recipe inside, as `model.backbone=torchvision/resnet18` where it names no network.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: no recipe inside or several, a recipe that names no network, **or** weights that have it nowhere, or
            more than once.
        RecipeError: a recipe or an override that cannot be used.
    """
    entry, weights = _entry(state, path), state.get("state_dict")
    if not isinstance(weights, Mapping):
        raise RunError(f"{path}: no weights inside")
    recipe = load_recipe(without_download(entry["recipe"]), overrides)
    if recipe.model is None or not (recipe.model.backbone or recipe.model.layers):
        raise RunError(
            f"{path}: its recipe names no network, since that is the LightningModule's: give it by model.backbone and "
            "model.args (kw evaluate FILE model.backbone=torchvision/resnet18 model.args.num_classes=10; "
            "kw predict with --set before each), or use kw_lightning.callbacks.load_from_checkpoint(YourModule, FILE)"
        )
    network = _static_network(recipe, allow_python)
    named = {str(key).replace(COMPILED, ""): value for key, value in weights.items() if isinstance(value, Tensor)}
    part, of_recipe = _place(network, named, entry, path), _dotted(entry.get("module"))
    tops = {name.partition(".")[0] for name in network.state_dict()}
    own = {key.removeprefix(part): value for key, value in named.items() if key.startswith(part)}
    return {
        **state,
        "epoch": _epoch(state),
        "state_dict": {f"{NETWORK}{key}": value for key, value in own.items() if key.partition(".")[0] in tops},
        "hyper_parameters": {"recipe": escape(_renamed(dict(recipe.document.data), of_recipe, part))},
        KEY: [{**entry, "module": NETWORK[:-1], "layout": _renamed_layout(entry.get("layout"), of_recipe, part)}],
    }


def without_download(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe's data that fetches nothing: that is asked for where a checkpoint is used, not inside."""
    data = recipe.get("data")
    args = data.get("args") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(args, Mapping) or "download" not in args:
        return recipe
    return {**recipe, "data": {**data, "args": {key: value for key, value in args.items() if key != "download"}}}


def guessed_preparation(state: Mapping[str, Any], recipe: Recipe, steps: Preprocessing | None) -> str | None:
    """Return in words what neither a LightningModule's checkpoint nor its recipe says of how images are prepared.

    Args:
        state: the checkpoint.
        recipe: with what was changed.
        steps: what is done in its place.
    """
    asked = recipe.data is not None and (recipe.data.eval or recipe.data.train)
    if asked or isinstance(state.get(PREPROCESSING), Mapping):
        return None
    return f"how images are prepared, so it is as of {steps.source if steps else 'no known weights'}"


def _entry(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return what KWCallback wrote; its recipe is a map, since a text would be a file of the checkpoint's choice."""
    entries = [entry for entry in state[KEY] if isinstance(entry, Mapping) and isinstance(entry.get("recipe"), Mapping)]
    if len(entries) != 1:
        found = f"{len(entries)} recipes, one for each KWCallback," if entries else "no recipe"
        raise RunError(f"{path}: {found} inside; a checkpoint with one can be used here")
    return entries[0]


def _static_network(recipe: Recipe, allow_python: Sequence[str]) -> nn.Module:
    assert recipe.model is not None
    fresh = replace(recipe, model=replace(recipe.model, pretrained=False))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return make_static(fresh, allow_python=allow_python)


def _place(network: nn.Module, weights: Mapping[str, Tensor], entry: Mapping[str, Any], path: Path) -> str:
    """Return what stands before the network's names in the weights: layers keep theirs when they become dynamic."""
    layers = [name for name, module in network.named_modules() if name and _has_state(module)]
    first = f"{layers[0]}." if layers else ""
    ends = {key[: key.find(first, start)] for key in weights for start in _starts(key) if key.startswith(first, start)}
    found = sorted(part for part in ends if all(_holds(weights, f"{part}{layer}.") for layer in layers))
    named = _dotted(entry.get("module"))
    if named in found:
        return named
    if len(found) != 1:
        where = f"several times ({', '.join(part or 'the whole' for part in found)})" if found else "nowhere"
        cure = "train with KWCallback(recipe, module=…)" if found else "another model.backbone, or other model.args?"
        raise RunError(f"{path}: the network of the recipe is {where} among the weights, once is needed: {cure}")
    return found[0]


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _starts(key: str) -> Iterator[int]:
    """Yield where the parts of a dotted name begin."""
    yield 0
    yield from (index + 1 for index, character in enumerate(key) if character == ".")


def _holds(weights: Mapping[str, Tensor], beginning: str) -> bool:
    return any(key.startswith(beginning) for key in weights)


def _dotted(module: object) -> str:
    return f"{module}.".replace(COMPILED, "") if isinstance(module, str) and module else ""


def _renamed(data: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """Return a recipe whose names, relative to `before`, are relative to `after`."""
    if before == after:
        return data
    changed = {**data}
    for name, warehouse in data.get("warehouses", {}).items():
        layers = [_renamed_selector(selector, before, after) for selector in warehouse.get("layers", ())]
        changed["warehouses"] = {**changed["warehouses"], name: {**warehouse, "layers": layers}}
    if isinstance(data.get("stages"), Mapping) and "exclude" in data["stages"]:
        excluded = [_renamed_glob(glob, before, after) for glob in data["stages"]["exclude"]]
        changed["stages"] = {**data["stages"], "exclude": excluded}
    return changed


def _renamed_selector(selector: Any, before: str, after: str) -> Any:
    if isinstance(selector, str):
        return _renamed_glob(selector, before, after)
    changed = {**selector, "name": _renamed_glob(selector.get("name", "*"), before, after)}
    if "exclude" in selector:
        changed["exclude"] = [_renamed_glob(glob, before, after) for glob in selector["exclude"]]
    return changed


def _renamed_glob(glob: str, before: str, after: str) -> str:
    """Return a glob relative to another part.

    One that begins with a wildcard may match more layers then, which `check_layout` notices.
    """
    whole = f"{before}{glob}".replace(COMPILED, "")
    return whole.removeprefix(after) if whole.startswith(after) else glob


def _renamed_layout(layout: Any, before: str, after: str) -> Any:
    if not isinstance(layout, Mapping):
        return None
    return {
        name: {
            **warehouse,
            "layers": {_renamed_glob(layer, before, after): share for layer, share in warehouse["layers"].items()},
        }
        for name, warehouse in layout.items()
        if isinstance(warehouse, Mapping) and isinstance(warehouse.get("layers"), Mapping)
    }


def _epoch(state: Mapping[str, Any]) -> Any:
    """Return the epoch, from 0, in which a checkpoint was written: Lightning counts on after the last one."""
    epoch = state.get("epoch")
    try:
        progress = state["loops"]["fit_loop"]["epoch_progress"]["current"]
        over = progress["ready"] == progress["completed"] == epoch
    except (KeyError, TypeError):
        return epoch
    return epoch - 1 if over and isinstance(epoch, int) and epoch > 0 else epoch
