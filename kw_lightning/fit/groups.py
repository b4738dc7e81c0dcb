"""Which parameters are trained how: weight decay, the learning rates of some layers, and layers that stay as they are.

A glob means a parameter, or a layer and all that is in it, by the names of the network (`named_modules()`). Cells that
several layers share are meant when all of these layers are, as the builder freezes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from kw_lightning.errors import RecipeError, mistake
from kw_lightning.nn import KWLayer
from kw_lightning.planning.selection import enclosing, matcher
from kw_lightning.recipe.types import Recipe, Train

_BIASES = ("bias", "basis_bias")
"""The low-rank form's bias has two dimensions here and one in the published code, which does not decay it."""


def parameter_groups(recipe: Recipe, network: nn.Module) -> list[dict[str, Any]]:
    """Return the network's trainable parameters in groups, as `torch.optim` takes them.

    Every parameter is in one group: those of `train.optimizer.groups` with their learning rate, in the recipe's order
    after the others, and each in two parts where `train.optimizer.no_decay` leaves some without weight decay. The
    groups depend on names alone, so that the state of a checkpoint fits with other rates and another weight decay.

    Raises:
        RecipeError: a glob that means nothing, **or** nothing that is trained.
    """
    wanted = (recipe.train or Train()).optimizer
    globs = {f"train.optimizer.groups[{i}].layers": group.layers for i, group in enumerate(wanted.groups)}
    check_globs(recipe, network, {**globs, "train.optimizer.no_decay": wanted.no_decay or ()})
    chosen = [meant(network, group.layers) for group in wanted.groups]
    spared = meant(network, wanted.no_decay or (), every=False)
    parts: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        index = next((i for i, parameters in enumerate(chosen) if parameter in parameters), -1)
        no_decay = wanted.no_decay is not None and (is_vector(name, parameter) or parameter in spared)
        parts.setdefault((index, no_decay), []).append(parameter)
    if not parts:
        raise RecipeError(recipe.document.problem("train.freeze", "every layer is frozen, so nothing is left to train"))
    groups = []
    for (index, no_decay), parameters in sorted(parts.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": parameters}
        if index >= 0:
            rate = wanted.groups[index]
            group["lr"] = rate.lr if rate.lr is not None else wanted.lr * rate.times
        if no_decay:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is one of those that the published training does not decay: biases, and all of norms."""
    return parameter.dim() <= 1 or name.rpartition(".")[2] in _BIASES


def meant(network: nn.Module, globs: Iterable[str], *, every: bool = True) -> set[nn.Parameter]:
    """Return the parameters that globs mean.

    Args:
        network: the network.
        globs: names or globs of layers and parameters.
        every: whether a parameter that several layers share is meant only if it is so in all of them.
    """
    tests = [matcher(glob) for glob in globs]
    names: dict[nn.Parameter, list[bool]] = {}
    for name, parameter in _every_name(network) if tests else ():
        found = any(test(part) for test in tests for part in enclosing(name))
        names.setdefault(parameter, []).append(found)
    return {parameter for parameter, found in names.items() if (all if every else any)(found)}


def layers_meant(network: nn.Module, globs: Iterable[str]) -> list[nn.Module]:
    """Return the modules that globs mean, and all inside them."""
    tests = [matcher(glob) for glob in globs]
    return [
        module
        for name, module in network.named_modules()
        if name and any(test(part) for test in tests for part in enclosing(name))
    ]


def freeze(recipe: Recipe, network: nn.Module) -> None:
    """Keep gradients from the layers of `train.freeze` that stay frozen for the whole run.

    Those that thaw after `train.freeze_epochs` keep theirs, which `Freezing` drops: strategies for several devices
    settle at the start of a run which parameters they bring together.

    Raises:
        RecipeError: a glob that means nothing.
    """
    train = recipe.train or Train()
    check_globs(recipe, network, {"train.freeze": train.freeze})
    if train.freeze_epochs is None:
        for parameter in meant(network, train.freeze):
            parameter.requires_grad_(False)


def check_globs(recipe: Recipe, network: nn.Module, globs: dict[str, Sequence[str]]) -> None:
    """Check that every glob of a recipe means something in the network.

    Raises:
        RecipeError: every one that does not, with the nearest name.
    """
    parameters = [name for name, _ in _every_name(network)]
    names = list(dict.fromkeys(part for name in parameters for part in enclosing(name)))
    problems = [
        recipe.document.problem(
            f"{path}[{index}]", mistake(glob, "names or globs of layers and parameters of the network", names=names)
        )
        for path, several in globs.items()
        for index, glob in enumerate(several)
        if not any(map(matcher(glob), names))
    ]
    if problems:
        raise RecipeError(problems)


def _every_name(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under each of its names; cells under those of all layers that share them."""
    yield from network.named_parameters(remove_duplicate=False)
    for name, layer in network.named_modules():
        if isinstance(layer, KWLayer) and layer.warehouse is not None:
            yield f"{name}.warehouse.cells".removeprefix("."), layer.warehouse.cells
