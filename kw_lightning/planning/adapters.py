"""Adapters in a plan: each warehouse of adapters is two, of the layers down to the rank and of those up from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from kw_lightning.errors import Problem, mistake, sentence
from kw_lightning.planning.network import Layer, Part, Reading
from kw_lightning.planning.selection import Choice, enclosing, matcher
from kw_lightning.recipe.types import Document, Warehouse

Chosen = Mapping[str, tuple[Choice, ...]]


def with_adapters(
    warehouses: Sequence[Warehouse], chosen: Chosen, document: Document
) -> tuple[list[Warehouse], dict[str, tuple[Choice, ...]], list[Problem]]:
    """Return the warehouses that are made, their layers, and every problem; those without an adapter as they are.

    The layers of a warehouse of adapters stay. Beside each stand two dynamic layers, which draw on `NAME-down` and
    `NAME-up`: the former from its input to `rank` channels by its own kernel size, the latter from there by size 1.
    The adapter of a grouped layer has no groups, and so mixes the layer's.
    """
    made: list[Warehouse] = []
    layers: dict[str, tuple[Choice, ...]] = {}
    problems: list[Problem] = []
    for warehouse in warehouses:
        choices, adapter = chosen[warehouse.name], warehouse.adapter
        if adapter is None:
            made.append(warehouse)
            layers[warehouse.name] = choices
            continue
        problems += _problems(warehouse, choices, document)
        for name, part in zip(warehouse.names, (down, up), strict=True):
            made.append(replace(warehouse, name=name))
            layers[name] = tuple(Choice(part(choice.layer, adapter.rank)) for choice in choices)
    names = [warehouse.name for warehouse in made]
    problems += [
        document.problem(warehouse.path, f'"{warehouse.name}" is the name of two warehouses; an adapter makes it, too')
        for index, warehouse in enumerate(made)
        if warehouse.name in names[:index]
    ]
    return made, layers, problems


def down(frozen: Layer, rank: int) -> Layer:
    """Return the dynamic layer from a frozen layer's input to `rank` channels."""
    return _beside(frozen, "down", (rank, frozen.in_channels, *frozen.kernel_size))


def up(frozen: Layer, rank: int) -> Layer:
    """Return the dynamic layer from `rank` channels to a frozen layer's output."""
    ones, zeros = (1,) * len(frozen.kernel_size), (0,) * len(frozen.kernel_size)
    half = _beside(frozen, "up", (frozen.out_channels, rank, *ones))
    return replace(half, reading=Reading(ones, ones, zeros, zeros) if ones else None)


def _beside(frozen: Layer, name: str, kernel_shape: tuple[int, ...]) -> Layer:
    return replace(
        frozen,
        name=f"{frozen.name}.{name}".removeprefix("."),
        aliases=tuple(f"{alias}.{name}" for alias in frozen.aliases),
        kernel_shape=kernel_shape,
        in_channels=kernel_shape[1],
        groups=1,
        parameters=0,
        part=Part(frozen, name),
    )


def _problems(warehouse: Warehouse, choices: Sequence[Choice], document: Document) -> list[Problem]:
    path, problems = f"{warehouse.path}.adapter", []
    if warehouse.budget.ratio is None:
        allowed = "a ratio, which both warehouses of an adapter have"
        message = sentence("a budget in cells or parameters", allowed)
        problems.append(document.problem(f"{warehouse.path}.budget", message))
    cut = next((choice for choice in choices if choice.rows is not None), None)
    if cut is not None:
        problems.append(document.problem(path, sentence(f'a slice, "{cut.name}"', "whole layers beside an adapter")))
    return problems


def trained(
    model: nn.Module, warehouses: Sequence[Warehouse], document: Document
) -> tuple[frozenset[str] | None, list[Problem]]:
    """Return which of a network's own parameters go on training beside adapters; None where there is no adapter.

    Names and globs mean a parameter, or a layer and all that is in it.
    """
    adapters = [(warehouse, warehouse.adapter) for warehouse in warehouses if warehouse.adapter is not None]
    if not adapters:
        return None, []
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not is_lazy(parameter)]
    known = list(dict.fromkeys(part for name in names for part in enclosing(name)))
    problems, tests = [], list[Callable[[str], bool]]()
    for warehouse, adapter in adapters:
        for index, pattern in enumerate(adapter.train):
            tests.append(matcher(pattern))
            if not any(map(tests[-1], known)):
                message = mistake(pattern, "names or globs of layers and parameters of the network", names=known)
                problems.append(document.problem(f"{warehouse.path}.adapter.train[{index}]", message))
    found = frozenset(name for name in names if any(test(part) for test in tests for part in enclosing(name)))
    return found, list(dict.fromkeys(problems))


__all__ = ["down", "trained", "up", "with_adapters"]
