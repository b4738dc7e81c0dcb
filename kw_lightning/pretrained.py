"""Pretrained weights for a recipe's network: by name, from torchvision or timm, or from a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kw_lightning.errors import Problem, RecipeError, RunError, first_line, listed, mistake
from kw_lightning.paths import user_path
from kw_lightning.recipe.types import Recipe
from kw_lightning.weights import read_weights

log = logging.getLogger(__name__)

FILES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


def load_pretrained(recipe: Recipe, network: nn.Module) -> None:
    """Load `model.pretrained` into a network: a weights name, a file (safetensors, or torch's with weights only).

    A classifier of another size than the weights' keeps its start values, when the recipe asks for that size; so does
    the last layer of a Keras-style network.

    Raises:
        RecipeError: no such weights; **or** keys that are missing, unexpected or of another shape, all listed.
        RunError: weights that cannot be read or fetched.
    """
    assert recipe.model is not None
    source = recipe.model.pretrained
    problem = partial(recipe.document.problem, "model.pretrained")
    try:
        path = _existing_file(recipe)
        weights = dict(read_weights(path, known=network.state_dict().keys()) if path else _named(recipe)())
    except RecipeError:
        raise
    except RunError as error:
        raise RunError(f"model.pretrained: {error}") from error
    except Exception as error:
        raise RunError(f"model.pretrained: {source}: cannot read the weights: {first_line(error)}") from error
    own = network.state_dict()
    fresh = _resized_classifier(network, own, weights)
    if "num_classes" not in recipe.model.args:
        last = list(network.named_modules())[-1][0] if recipe.model.layers else None
        fresh = [key for key in fresh if key.rpartition(".")[0] == last]
    weights = {key: value for key, value in weights.items() if key not in fresh}
    faults = [f"{key}: missing" for key in own if key not in weights and key not in fresh]
    faults += [f"{key}: unexpected" for key in weights if key not in own]
    faults += [
        f"{key}: {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if faults:
        raise RecipeError(problem(f"{source} does not fit the network: {listed(faults, 20, '; ')}"))
    network.load_state_dict(weights, strict=False)
    if fresh:
        log.warning("model.pretrained: the classifier has another size, so it starts anew: %s", ", ".join(fresh))


def check_pretrained(recipe: Recipe, *, here: bool = True) -> None:
    """Refuse weights that neither the backbone's library nor a file has; nothing is fetched or read.

    Args:
        recipe: its `model.backbone` and `model.pretrained` are looked at.
        here: whether it is to be trained on this machine, which then has to have the file.

    Raises:
        RecipeError: no such weights.
    """
    if recipe.model is None or not recipe.model.pretrained:
        return
    if _existing_file(recipe) is None and (here or not _names_a_file(recipe)):
        _named(recipe)


def _named(recipe: Recipe) -> Callable[[], Mapping[str, Tensor]]:
    """Return what fetches the weights that a recipe names, of the library of its backbone.

    Raises:
        RecipeError: there are no such weights.
    """
    problem = partial(recipe.document.problem, "model.pretrained")
    model = recipe.model
    assert model is not None
    source = model.pretrained
    library, _, name = (model.backbone or "").partition("/")
    if _names_a_file(recipe):
        raise RecipeError(problem(f"there is no file {source}, neither here nor beside the recipe"))
    if library == "torchvision":
        return partial(_torchvision_weights(name, source, problem).get_state_dict, progress=False, check_hash=True)
    if library == "timm":
        return partial(_timm_weights, _timm_tag(name, source, problem))
    kind = "a python: network" if model.backbone else "a network of layers"
    raise RecipeError(problem(mistake(source, f"a file of weights, for {kind}")))


def _torchvision_weights(name: str, source: str | bool, problem: Callable[[str], Problem]) -> Any:
    import torchvision

    weights = torchvision.models.get_model_weights(name)
    try:
        return weights["DEFAULT" if source is True else str(source)]
    except KeyError:
        names = [member.name for member in weights]
        message = mistake(source, ["a file", *names], what="the unknown weights", names=names)
        raise RecipeError(problem(message)) from None


def _timm_tag(name: str, source: str | bool, problem: Callable[[str], Problem]) -> str:
    import timm

    base = name.partition(".")[0]
    tag = name if source is True else f"{base}.{source}"
    if timm.models.is_model_pretrained(tag):
        return tag
    names = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    raise RecipeError(problem(mistake(source, ["a file", *names], what="the unknown weights", names=names)))


def _timm_weights(tag: str) -> Mapping[str, Tensor]:
    import timm

    return dict(timm.create_model(tag, pretrained=True).state_dict())


def _names_a_file(recipe: Recipe) -> bool:
    assert recipe.model is not None
    source = recipe.model.pretrained
    return isinstance(source, str) and Path(source).suffix in FILES


def _existing_file(recipe: Recipe) -> Path | None:
    """Return the file that is meant, as it stands or beside the recipe."""
    assert recipe.model is not None
    source = recipe.model.pretrained
    if not isinstance(source, str):
        return None
    path = user_path(source)
    candidates = (path, Path(recipe.document.source).parent / path)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _resized_classifier(network: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of the last layers whose number of outputs differs from the weights', and of no other layer."""
    return [
        key
        for key, value in own.items()
        if key in weights
        and weights[key].dim() == value.dim() > 0
        and weights[key].shape[0] != value.shape[0]
        and weights[key].shape[1:] == value.shape[1:]
        and key.rpartition(".")[2] in {"weight", "bias"}
        and isinstance(network.get_submodule(key.rpartition(".")[0]), nn.Linear | nn.Conv2d)
    ]
