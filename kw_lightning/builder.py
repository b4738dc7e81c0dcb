"""The builder executes a plan: it puts dynamic layers in the place of static ones, in all places or in none."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kw_lightning import backbones
from kw_lightning.errors import KWError, RecipeError, sentence
from kw_lightning.nn import KWLayer, KWLinear, attach_warehouse
from kw_lightning.nn.adapter import Adapted, count_trainable, trainable_line
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.nn.warm_start import load_kernels
from kw_lightning.nn.weighing import SoftmaxAnnealing
from kw_lightning.planning import LayerPlan, Plan, WarehousePlan, plan
from kw_lightning.planning.geometry import attention_form
from kw_lightning.planning.plan import check_network
from kw_lightning.pretrained import load_pretrained
from kw_lightning.published import WORD, load_placed
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe
from kw_lightning.replacement import (
    Static,
    adapted,
    adapter_half,
    draw_what_is_missing,
    dynamic_layer,
    freeze_others,
    keep_from_fusing,
    replacement,
    rows_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What applying a plan gave.

    Attributes:
        model: the network; another object than before only where the network was a single layer.
        errors: of a warm start, each warehouse's relative error ‖lost‖ / ‖kernels‖ over all its layers: 0 where the
            budget is 1 or more, since every part of the old kernels then has a cell of its own.
        temperature: τ at which the network has the old kernels; 1 where there was no warm start.
    """

    model: nn.Module
    errors: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0


def build(
    source: str | Path | Mapping[str, Any] | Recipe | Plan, *, allow_python: Sequence[str] = (), pretrained: bool = True
) -> nn.Module:
    """Make the network that a recipe describes, with its warehouses; a recipe without any makes the static network.

    A recipe with `model.pretrained` starts warm, see `apply_plan`.

    Args:
        source: the recipe, as `convert` takes it, **or** its plan, which is then executed as it stands.
        allow_python: packages whose code the recipe may name.
        pretrained: whether to load the pretrained weights that the recipe names; not where others follow.

    Raises:
        RecipeError: a recipe that does not fit its network; see `kw_lightning.planning.plan`.
        RunError: pretrained weights that cannot be read.
    """
    planned = source if isinstance(source, Plan) else plan(source, allow_python=allow_python)
    recipe = planned.recipe
    placed = pretrained and starts_published(recipe)
    if recipe.model is not None and (placed or not pretrained):
        recipe = replace(recipe, model=replace(recipe.model, pretrained=False))
    model = make_static(recipe, allow_python=allow_python)
    network = report(planned, apply_plan(planned, model, warm_start=starts_warm(recipe))).model
    if placed and not torch.empty(0).is_meta:
        assert recipe.model is not None
        load_placed(network, str(recipe.model.backbone), recipe.name)
    return network


def starts_warm(recipe: Recipe) -> bool:
    """Say whether the recipe's network starts from the kernels of a static one."""
    return recipe.model is not None and bool(recipe.model.pretrained) and not starts_published(recipe)


def starts_published(recipe: Recipe) -> bool:
    """Say whether the recipe's network starts from a checkpoint of the authors, cells and attention included."""
    return recipe.model is not None and recipe.model.pretrained == WORD


def make_static(recipe: Recipe, *, allow_python: Sequence[str] = ()) -> nn.Module:
    """Make the static network that a recipe describes, pretrained weights included, without warehouses."""
    if recipe.model is not None and recipe.model.layers:
        from kw_lightning.keras import read_network

        network = read_network(recipe, allow_python=allow_python).build()
        # Weights beside a backbone are the backbone's; on the meta device none are read.
        if recipe.model.pretrained and recipe.model.backbone is None and not torch.empty(0).is_meta:
            load_pretrained(recipe, network)
        return network
    return backbones.create(recipe, allow_python=allow_python)


def convert(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    inplace: bool = True,
    warm_start: bool = False,
) -> nn.Module:
    """Make layers of a network dynamic as a recipe says.

    Args:
        model: any network; the recipe's names are relative to it.
        recipe: a path, a shipped recipe's name, the recipe as plain data, or a recipe already loaded; its
            `model.backbone` is not used.
        inplace: change the network itself; False leaves it as it is and changes a copy.
        warm_start: start from the network's weights, see `apply_plan`.

    Returns:
        The network. A network that is itself one convolution or linear layer cannot be changed in place: the dynamic
        layer is returned.

    Raises:
        RecipeError: a recipe that does not fit the network; the network is then unchanged.
        KWError: a network that is dynamic already.
        TypeError: a `model` that is no network.

    Example:
        >>> model = convert(torchvision.models.resnet18(), "resnet18-kw-1x")
    """
    check_network(model)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    planned = plan(loaded, model)
    require_warehouses(planned)
    if planned.warning is not None:
        log.warning("%s", planned.warning)
    target = model if inplace else copy.deepcopy(model)
    return report(planned, apply_plan(planned, target, warm_start=warm_start)).model


def require_warehouses(planned: Plan) -> None:
    """Refuse a plan that leaves the network static.

    Raises:
        RecipeError: its recipe has no warehouses.
    """
    if not planned.warehouses:
        text = "a recipe for a network needs warehouses, or stages"
        raise RecipeError(planned.recipe.document.problem("warehouses", text))


def apply_plan(planned: Plan, model: nn.Module, *, warm_start: bool = False) -> Conversion:
    """Put the plan's dynamic layers into a network.

    Hooks, device, dtype, training mode, biases and `requires_grad` of the layers are kept: a layer whose weight is
    frozen has a frozen attention, and a warehouse of frozen layers only has frozen cells. All new layers are made
    before the first is put in place, so that a failure leaves the network as it was.

    Args:
        planned: made for this network, or for its like on the meta device.
        model: the static network.
        warm_start: start from the old kernels. Where every budget is 1 or more the output at τ = 1 is what it was.
            With any budget under 1, or where the recipe's `temperature.start` is 0, τ is 0, and the kernels are as
            near as so few cells can come; see `kw_lightning.nn.warm_start`.

    Layers of a warehouse with an adapter stay as they are, and so does the network's output at first; all that neither
    an adapter nor a dynamic layer has, and `adapter.train` does not name, is then frozen.

    Raises:
        KWError: a network that the plan was not made for, **or** layers of one warehouse on several devices or in
            several types.
    """
    statics = _static_layers(planned, dict(model.named_modules(remove_duplicate=False)))
    if warm_start and any(static.weight.is_meta for static in statics.values()):
        raise KWError("a warm start needs weights: the network is on the meta device")
    made: dict[str, list[tuple[LayerPlan, KWLayer]]] = {}
    errors: dict[str, float] = {}
    temperature = warm_temperature(planned) if warm_start else 1.0
    if warm_start:
        _check_warm_start(planned, temperature)
    for warehouse in planned.warehouses:
        dynamics = _make_warehouse(warehouse, statics)
        if warm_start and warehouse.spec.adapter is not None:
            errors[warehouse.name] = 0.0  # the old kernels stay
        elif warm_start:
            kernels = [rows_of(statics[layer.layer.name].weight, layer.rows) for layer in warehouse.layers]
            errors[warehouse.name] = load_kernels(dynamics, kernels, temperature)
        for layer, dynamic in zip(warehouse.layers, dynamics, strict=True):
            dynamic.engine, dynamic.epilogue = planned.recipe.engine, planned.recipe.epilogue
            dynamic.name = layer.name
            if isinstance(dynamic, KWLinear):
                _place_batch(dynamic, layer, warehouse)
            made.setdefault(layer.layer.stands.name, []).append((layer, dynamic))
    trains = planned.trains
    kept = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if trains and name in trains}
    network = _swap(model, planned, {name: _new(statics[name], parts) for name, parts in made.items()})
    if trains is not None:
        freeze_others(network, kept)
    return Conversion(network, errors, temperature)


def _new(static: Static, parts: Sequence[tuple[LayerPlan, KWLayer]]) -> nn.Module:
    """Return what stands in a layer's place: dynamic layers, **or** itself with an adapter."""
    halves = {layer.layer.part.name: dynamic for layer, dynamic in parts if layer.layer.part is not None}
    if halves:
        return adapted(static, halves["down"], halves["up"])
    return replacement(static, [(layer.rows, dynamic) for layer, dynamic in parts])


def report(planned: Plan, conversion: Conversion) -> Conversion:
    """Log what a warm start kept of the old kernels, and how much trains beside adapters; return the conversion."""
    errors, temperature = conversion.errors, conversion.temperature
    if planned.trains is not None:
        log.info("%s", trainable_line(*count_trainable(conversion.model)))
    if errors and not any(errors.values()):
        log.info("warm start: all dynamic layers have the old kernels at temperature %g", temperature)
    better = "" if temperature == 0 else "temperature.start: 0 comes nearer, and "
    for warehouse in planned.warehouses:
        if errors.get(warehouse.name):
            log.warning(
                "warm start: the %d layers of warehouse %r, with budget %.3g, come near their old kernels at "
                "temperature %g: relative error %.2f; %sa budget of 1 or more keeps them",
                len(warehouse.layers),
                warehouse.name,
                float(warehouse.budget),
                temperature,
                errors[warehouse.name],
                better,
            )
    return conversion


def warm_start_errors(planned: Plan, *, allow_python: Sequence[str] = ()) -> Mapping[str, float]:
    """Return how far a warm start leaves each warehouse from the old kernels, see `Conversion.errors`.

    Args:
        planned: of a recipe whose `model.pretrained` names weights; they are loaded.
        allow_python: packages whose code the recipe may name.

    Raises:
        KWError: a recipe that does not start from the kernels of a static network.
        RunError: pretrained weights that cannot be read.
    """
    if not starts_warm(planned.recipe):
        raise KWError("there is no warm start to look at: model.pretrained names no weights of a static network")
    return apply_plan(planned, make_static(planned.recipe, allow_python=allow_python), warm_start=True).errors


def warm_temperature(planned: Plan) -> float:
    """Return τ at which a warm start has the old kernels, 1 or 0: where the recipe's annealing starts.

    Unless that is said it is 1 where every part of a kernel has a cell of its own, else 0.
    """
    start = planned.recipe.temperature.start
    if start is None:
        return 1.0 if all(warehouse.budget >= 1 for warehouse in planned.warehouses) else 0.0
    return 1.0 if start == 1 else 0.0


def _check_warm_start(planned: Plan, temperature: float) -> None:
    """Refuse a warm start that needs weights of either sign from a function that has none."""
    document = planned.recipe.document
    problems = []
    for warehouse in planned.warehouses:
        attention, alone = warehouse.attention, warehouse.partition.mixtures == 1
        needed = temperature == 0 or attention.start == "none"
        needed = needed and warehouse.spec.adapter is None
        if needed and attention.function != "contrast" and not (alone and attention.function == "softmax"):
            found = f'a warm start with "{attention.function}" at temperature 0, or without a start'
            text = sentence(found, "contrast, or temperature.start: 1 with attention.start: own or shared")
            problems.append(document.problem(f"{warehouse.spec.path}.attention.function", text))
    if problems:
        raise RecipeError(problems)


def _static_layers(planned: Plan, modules: Mapping[str, nn.Module]) -> dict[str, Static]:
    """Return the layers that the plan replaces, by name."""
    found: dict[str, Static] = {}
    for layer in (layer.layer.stands for warehouse in planned.warehouses for layer in warehouse.layers):
        module = modules.get(layer.name)
        if isinstance(module, KWLayer | PartialLayer | Adapted):
            raise KWError(f'"{layer.name}" is dynamic already; convert a network once, from its static form')
        if not isinstance(module, Static) or tuple(module.weight.shape) != layer.kernel_shape:
            what = "no such layer" if module is None else f"another {type(module).__name__}"
            raise KWError(f'the plan is for another network: "{layer.name}" is {what}, not {list(layer.kernel_shape)}')
        found[layer.name] = module
    return found


def _make_warehouse(warehouse: WarehousePlan, statics: Mapping[str, Static]) -> list[KWLayer]:
    sources = [statics[layer.layer.stands.name] for layer in warehouse.layers]
    places = {
        (source.weight.device, source.weight.dtype): layer.name
        for source, layer in zip(sources, warehouse.layers, strict=True)
    }
    if len(places) > 1:
        found = " and ".join(f'"{name}" in {dtype} on {device}' for (device, dtype), name in places.items())
        raise KWError(f'the layers of warehouse "{warehouse.name}" need one device and one type: found {found}')
    layers = [_dynamic(source, layer) for source, layer in zip(sources, warehouse.layers, strict=True)]
    parts = {layer.layer.part.name for layer in warehouse.layers if layer.layer.part is not None}
    shared = attach_warehouse(
        layers,
        warehouse.partition,
        name=warehouse.name,
        cell_start="zeros" if "up" in parts else "projection" if "down" in parts else "kernels",
        device=sources[0].weight.device,
        dtype=sources[0].weight.dtype,
        softmax_annealing=_softmax_annealing(warehouse),
        **attention_form(warehouse.spec),
    )
    shared.cells.requires_grad_(bool(parts) or any(source.weight.requires_grad for source in sources))
    for layer, source in zip(layers, sources, strict=True):
        if layer.attention is not None:
            layer.attention.requires_grad_(bool(parts) or source.weight.requires_grad)
        layer.train(source.training)
    return layers


def _softmax_annealing(warehouse: WarehousePlan) -> SoftmaxAnnealing | None:
    asked = warehouse.attention.softmax_temperature
    if asked is None or warehouse.attention.function != "softmax":
        return None
    return SoftmaxAnnealing(asked.start, asked.end, asked.epochs)


def _dynamic(source: Static, layer: LayerPlan) -> KWLayer:
    part = layer.layer.part
    if part is None:
        return dynamic_layer(source, layer.rows)
    return adapter_half(source, layer.partition.kernel_shape, up=part.name == "up")


def _place_batch(dynamic: KWLinear, layer: LayerPlan, warehouse: WarehousePlan) -> None:
    """Set which dimension is a linear layer's batch, and where that is a guess, the module that makes it doubtful."""
    dynamic.batch_dim = warehouse.spec.batch_dim or 0
    if warehouse.spec.batch_dim is None:
        dynamic.beside = layer.layer.beside


def _swap(model: nn.Module, planned: Plan, replacements: Mapping[str, nn.Module]) -> nn.Module:
    standing = (layer.layer.stands for warehouse in planned.warehouses for layer in warehouse.layers)
    names = {layer.name: layer.names for layer in standing}
    if "" in replacements:
        return replacements[""]
    parents = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)
        for name, new in replacements.items()
        for path in names[name]
    ]
    before = [(parent, child, parent._modules[child]) for parent, child, _ in parents]
    try:
        for parent, child, new in parents:
            setattr(parent, child, new)
    except BaseException:
        for parent, child, old in before:
            parent._modules[child] = old
        raise
    keep_from_fusing(model, replacements)
    draw_what_is_missing(model, replacements)
    return model


__all__ = [
    "Conversion",
    "apply_plan",
    "build",
    "convert",
    "make_static",
    "report",
    "starts_published",
    "starts_warm",
    "warm_start_errors",
]
