"""From a recipe and a network to a plan: pure, on the meta device, every problem of the recipe at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kw_lightning import backbones
from kw_lightning.errors import Problem, RecipeError, kind, sentence, times
from kw_lightning.limits import MAX_INPUT, MAX_MIXTURES, MAX_PARAMETERS, TooLargeError, bounded_construction
from kw_lightning.nn.engine import ENGINES, Convolution, refusal
from kw_lightning.nn.partition import PartitionError, WarehousePartition
from kw_lightning.planning.adapters import trained, with_adapters
from kw_lightning.planning.budgets import solve
from kw_lightning.planning.checks import place_batches, read_in_training
from kw_lightning.planning.geometry import Geometry, measure
from kw_lightning.planning.macs import layer_macs, total_macs
from kw_lightning.planning.network import Network, calls, refuse_dynamic, survey
from kw_lightning.planning.proportion import refusals, warning, without_it
from kw_lightning.planning.selection import Choice, excluded_by, select
from kw_lightning.planning.stages import Found, stage_warehouses
from kw_lightning.planning.tracing import Trace, trace
from kw_lightning.planning.types import Count, LayerPlan, Plan, StaticLayer, WarehousePlan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe, Selector, Warehouse


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: nn.Module | None = None,
    *,
    allow_python: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
) -> Plan:
    """Work out what a recipe does to a network.

    Args:
        recipe: a path, a shipped recipe's name, the recipe as plain data, or a recipe already loaded.
        model: the network; None makes the recipe's own on the meta device, where weights take no memory.
        allow_python: packages whose code the recipe may run, see `kw_lightning.backbones.create`.
        input_shape: [channels, *size] of one sample; None takes the recipe's or the network's usual one.

    Returns:
        The plan; of a recipe without warehouses that of the static network.

    Raises:
        RecipeError: everything about the recipe that does not fit the network, in one go.
        KWError: a network that is dynamic already.
        TypeError: a `model` that is no network.
    """
    if model is not None:
        check_network(model)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    # Planning takes no random numbers: a seed gives the same network with and without a plan before it.
    with torch.random.fork_rng(devices=[]):
        return _plan(loaded, model, allow_python, input_shape)


def check_network(model: object) -> None:
    """Refuse what is no network.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(sentence(f"{kind(model)} in the place of the network", "a torch.nn.Module"))
    if isinstance(model, torch.jit.ScriptModule):
        found = "a TorchScript module, which is compiled already, in the place of the network"
        raise TypeError(sentence(found, "the torch.nn.Module that it was made of"))


def _plan(
    recipe: Recipe, model: nn.Module | None, allow_python: Sequence[str], input_shape: Sequence[int] | None
) -> Plan:
    if model is None:
        model, recipe, usual = _network(recipe, allow_python)
    else:
        usual = recipe.model.input if recipe.model is not None else None
    shape = tuple(input_shape) if input_shape is not None else usual
    if shape is not None and math.prod(shape) > MAX_INPUT:
        message = sentence(f"an input of {math.prod(shape):,} numbers", f"at most {MAX_INPUT:,}")
        raise TooLargeError(recipe.document.problem("model.input", message))
    refuse_dynamic(model)
    forward = trace(model, shape) if shape is not None else Trace(failure="the shape of the input is not known")
    network = survey(model, forward)
    warehouses, static_reasons, problems = _warehouses(recipe, network, model, forward)
    chosen, found = select(network, warehouses, recipe.document)
    problems += found
    problems += read_in_training(model, shape, forward, warehouses, chosen, recipe.document)
    chosen, found = place_batches(model, shape, forward, warehouses, chosen, recipe.document)
    problems += found
    made, layers, found = with_adapters(warehouses, chosen, recipe.document)
    problems += found
    trains, found = trained(model, warehouses, recipe.document)
    problems += found
    geometries, found = _geometries(recipe, made, layers)
    problems += found
    problems += _unserved(recipe, geometries)
    static = sum(parameter.numel() for parameter in _parameters(model))
    gone = [choice for choices in layers.values() for choice in choices if choice.layer.part is None]
    replaced = sum(math.prod(choice.kernel_shape) for choice in gone)
    _raise_any(problems)
    partitions, found = solve(
        geometries,
        static_parameters=static,
        fixed_parameters=static - replaced,
        overall=recipe.model.budget if recipe.model is not None else None,
        document=recipe.document,
    )
    _raise_any(found)
    planned = tuple(
        _warehouse_plan(geometry, partitions[geometry.spec.name], forward, recipe.engine) for geometry in geometries
    )
    kw = static - replaced + sum(w.cell_parameters + w.attention_parameters for w in planned)
    _refuse_excess(kw, planned, layers, recipe)
    return Plan(
        recipe=replace(recipe, warehouses=tuple(warehouses), stages=None),
        warehouses=planned,
        static_layers=tuple(_static_layers(network, warehouses, chosen, forward, static_reasons)),
        parameters=Count(static, kw),
        macs=total_macs(planned, forward),
        macs_note=forward.failure,
        input_shape=shape,
        warning=warning(planned),
        trains=trains,
        trainable=None if trains is None else kw - static + replaced + _kept(model, trains, gone),
    )


def _raise_any(problems: Sequence[Problem]) -> None:
    if problems:
        raise RecipeError(problems)


def _refuse_excess(
    parameters: int, planned: Sequence[WarehousePlan], layers: Mapping[str, Sequence[Choice]], recipe: Recipe
) -> None:
    """Refuse a network of more parameters than a recipe may ask for, and attentions far larger than their cells.

    Raises:
        RecipeError: there is one.
    """
    if parameters > MAX_PARAMETERS:
        largest = max(planned, key=lambda warehouse: warehouse.cell_parameters + warehouse.attention_parameters)
        cure = without_it(largest.spec, layers[largest.name])
        message = sentence(f"a network of {parameters:,} parameters", f"{MAX_PARAMETERS:,}", cure)
        raise TooLargeError(recipe.document.problem(largest.spec.path, message))
    _raise_any(list(refusals(planned, recipe.document)))


def _network(recipe: Recipe, allow_python: Sequence[str]) -> tuple[nn.Module, Recipe, tuple[int, ...] | None]:
    if recipe.model is not None and recipe.model.layers:
        from kw_lightning.keras import read_network

        described = read_network(recipe, allow_python=allow_python)
        with bounded_construction("the network"), torch.device("meta"):
            model = described.build()
        return model, _with_named_layers(recipe, described.warehouses), tuple(described.input_shape)
    model = backbones.create(recipe, allow_python=allow_python, device="meta")
    return model, recipe, backbones.input_shape(recipe, model)


def _with_named_layers(recipe: Recipe, named: Mapping[str, Sequence[str]]) -> Recipe:
    """Give the recipe's warehouses the layers that name them where they are declared."""
    known = {warehouse.name: warehouse for warehouse in recipe.warehouses}
    for name, layers in named.items():
        path = f"warehouses.{name}"
        selectors = tuple(Selector(name=layer, path=path) for layer in layers)
        warehouse = known.get(name, Warehouse(name=name, layers=(), path=path))
        known[name] = replace(warehouse, layers=(*warehouse.layers, *selectors))
    return replace(recipe, warehouses=tuple(known.values()))


def _warehouses(recipe: Recipe, network: Network, model: nn.Module, forward: Trace) -> Found:
    if recipe.stages is None:
        return Found(list(recipe.warehouses), {}, [])
    found = stage_warehouses(recipe, network, model, forward)
    return found._replace(warehouses=[*recipe.warehouses, *found.warehouses])


def _geometries(
    recipe: Recipe, warehouses: Sequence[Warehouse], chosen: Mapping[str, tuple[Choice, ...]]
) -> tuple[list[Geometry], list[Problem]]:
    geometries, problems, mixtures = [], [], 0
    for warehouse in warehouses:
        choices = chosen[warehouse.name]
        if not choices:
            if not warehouse.layers:
                problems.append(recipe.document.problem(warehouse.path, "the warehouse has no layers"))
            continue
        try:
            geometry = measure(warehouse, choices)
        except PartitionError as error:
            apart = "; stages.split: kernel_size keeps them apart" if _sizes_differ(warehouse, choices) else ""
            message = f"{error}; layers: {_kernels(choices)}{apart}"
            problems.append(recipe.document.problem(warehouse.path, message))
            continue
        geometries.append(geometry)
        if warehouse.attention.gates and not warehouse.dynamic:
            message = sentence("attention.gates with dynamic: false", "either; gates follow the sample")
            problems.append(recipe.document.problem(warehouse.path, message))
        mixtures += geometry.mixtures
        mistake = _mistake_of_budget(warehouse, geometry)
        if mistake is not None:
            problems.append(recipe.document.problem(f"{warehouse.path}.budget", mistake))
    if mixtures > MAX_MIXTURES:
        largest = max(geometries, key=lambda geometry: geometry.mixtures)
        cell = f"cells of {times(largest.cell_shape)} and so {mixtures:,} mixtures"
        message = sentence(cell, f"at most {MAX_MIXTURES:,}", without_it(largest.spec, largest.choices))
        raise TooLargeError([*problems, recipe.document.problem(largest.spec.path, message)])
    return geometries, problems


def _mistake_of_budget(warehouse: Warehouse, geometry: Geometry) -> str | None:
    """Return why so many cells cannot be, None where they can."""
    budget = warehouse.budget
    if budget.cells is not None and budget.cells < 1:
        return "a warehouse needs at least one cell"
    if budget.ratio is not None and budget.ratio <= 0:
        return "a budget is greater than 0"
    cells = budget.cells or geometry.cells_at(budget.ratio or Fraction(1))
    if cells * math.prod(geometry.cell_shape) > MAX_PARAMETERS:
        return f"{cells:,} cells of {times(geometry.cell_shape)} are more than {MAX_PARAMETERS:,} parameters"
    return None


def _sizes_differ(warehouse: Warehouse, choices: Sequence[Choice]) -> bool:
    """Return whether a warehouse of `stages` has kernels of several sizes."""
    return warehouse.path == "stages" and len({choice.layer.kernel_size for choice in choices}) > 1


def _kernels(choices: Sequence[Choice]) -> str:
    """Return one layer of each kernel shape, for a message."""
    examples: dict[tuple[int, ...], str] = {}
    for choice in choices:
        examples.setdefault(choice.kernel_shape, choice.name)
    texts = [f"{name} [{times(shape)}]" for shape, name in examples.items()]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} other shapes" if len(texts) > 6 else "")


def _unserved(recipe: Recipe, geometries: Sequence[Geometry]) -> list[Problem]:
    """Return a problem where the recipe's engine cannot compute all layers, with the engines that can."""
    convolutions = {
        choice.name: Convolution(choice.kernel_shape, geometry.cell_shape, groups=choice.layer.groups)
        for geometry in geometries
        for choice in geometry.choices
        if geometry.spec.dynamic
    }
    reasons = {name: refusal(recipe.engine, convolution) for name, convolution in convolutions.items()}
    unserved = [name for name, reason in reasons.items() if reason is not None]
    if not unserved:
        return []
    first = convolutions[unserved[0]]
    count = len(unserved) - 1
    others = f" and {count} other layer{'s' if count > 1 else ''}" if count else ""
    found = (
        f'"{recipe.engine}", which cannot compute "{unserved[0]}" [{times(first.kernel_shape)}, '
        f"{first.groups} groups]{others} ({reasons[unserved[0]]})"
    )
    allowed = [engine for engine in ENGINES if all(refusal(engine, each) is None for each in convolutions.values())]
    return [recipe.document.problem("engine", sentence(found, ", ".join(allowed)))]


def _warehouse_plan(geometry: Geometry, partition: WarehousePartition, forward: Trace, engine: str) -> WarehousePlan:
    sizes = geometry.attention_sizes(partition)
    layers = []
    for choice, share, size in zip(geometry.choices, partition.layers, sizes, strict=True):
        found = LayerPlan(choice.layer, choice.rows, share, size)
        inputs = tuple(call.inputs for call in calls(choice.layer, forward))
        layers.append(replace(found, macs=layer_macs(found, geometry.spec, forward, engine), inputs=inputs))
    shapes = [choice.kernel_shape for choice in geometry.choices]
    divisors = (math.gcd(*(shape[0] for shape in shapes)), math.gcd(*(shape[1] for shape in shapes)))
    return WarehousePlan(geometry.spec, partition, tuple(layers), divisors)


def _static_layers(
    network: Network,
    warehouses: Sequence[Warehouse],
    chosen: Mapping[str, tuple[Choice, ...]],
    forward: Trace,
    reasons: Mapping[str, str],
) -> Iterator[StaticLayer]:
    taken = {choice.layer.name for choices in chosen.values() for choice in choices}
    for layer in network.layers:
        if layer.name not in taken:
            reason = layer.refusal or reasons.get(layer.name) or excluded_by(layer, warehouses)
            if reason is None and forward.failure is None and not forward.calls_of(layer.names):
                reason = "the forward pass does not call it"
            yield StaticLayer(layer, reason or "no warehouse takes it")


def _kept(model: nn.Module, trains: frozenset[str], gone: Iterable[Choice]) -> int:
    """Return the numbers in those of a network's own parameters that train and stay."""
    weights = {f"{name}.weight" for choice in gone for name in choice.layer.names}
    return sum(p.numel() for name, p in model.named_parameters() if name in trains - weights)


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if not is_lazy(p))
