"""Making a LightningModule dynamic, and finding the moment for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kw_lightning.builder import apply_plan, report, require_warehouses
from kw_lightning.callbacks.layout import dynamic_layers, layers_of_warehouses
from kw_lightning.errors import KWError, mistake
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

Source = str | Path | Mapping[str, Any] | Recipe


def callback_recipe(source: Source) -> Recipe:
    """Return the recipe for a LightningModule: without what the LightningModule and the Trainer decide.

    Of the section `model` the input's shape and the overall budget are kept, which the plan needs.

    Raises:
        RecipeError: a recipe that cannot be used.
    """
    recipe = source if isinstance(source, Recipe) else load_recipe(source)
    ignored = [name for name in ("model", "data", "train", "trainer", "callbacks") if getattr(recipe, name)]
    if not ignored:
        return recipe
    rank_zero_warn(
        f'recipe "{recipe.name}": ignored the sections {", ".join(ignored)}; '
        "network, data and training are those of the LightningModule and the Trainer"
    )
    model = recipe.model
    if model is not None:
        model = replace(model, backbone=None, args={}, pretrained=False, layers=(), blocks={})
    return replace(recipe, model=model, data=None, train=None, trainer={}, callbacks=())


def submodule(pl_module: nn.Module, path: str | None) -> nn.Module:
    """Return the part of a network that a recipe is for: all of it, or the submodule at `path`.

    Raises:
        KWError: there is no such submodule.
    """
    if path is None:
        return pl_module
    try:
        return pl_module.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in pl_module.named_modules() if name]
        parts = ", ".join(name for name, _ in pl_module.named_children())
        allowed = f"{parts} of {type(pl_module).__name__}, and what is inside them"
        raise KWError(mistake(path, allowed, what="the unknown submodule", names=names)) from error


def make_dynamic(
    pl_module: nn.Module,
    recipe: Recipe,
    path: str | None = None,
    *,
    copies: Sequence[str] = (),
    warm_start: bool = False,
) -> nn.Module:
    """Make a LightningModule, or its submodule at `path`, dynamic; one that is dynamic already stays as it is.

    Args:
        pl_module: the LightningModule.
        recipe: the recipe.
        path: of the submodule; None means all of it.
        copies: paths of copies of the submodule, which become dynamic with it and start from its weights.
        warm_start: see `kw_lightning.builder.apply_plan`.

    Returns:
        The part of the network that the recipe is for.

    Raises:
        RecipeError: a recipe that does not fit the network.
        KWError: no such submodule, **or** a network that is dynamic by another recipe.
    """
    target = submodule(pl_module, path)
    if dynamic_layers(target):
        _check_same_warehouses(target, recipe)
        return target
    example = getattr(pl_module, "example_input_array", None) if path is None else None
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else None
    planned = plan(recipe, target, input_shape=shape)
    require_warehouses(planned)
    if planned.warning is not None:
        rank_zero_warn(planned.warning)
    converted = report(planned, apply_plan(planned, target, warm_start=warm_start)).model
    _put(pl_module, path, converted)
    for copy in copies:
        twin = apply_plan(planned, submodule(pl_module, copy)).model
        twin.load_state_dict(converted.state_dict())
        _put(pl_module, copy, twin)
    return converted


def _put(pl_module: nn.Module, path: str | None, network: nn.Module) -> None:
    """Put a network in its place; another object than before is there only where it is itself one layer."""
    if path is not None and pl_module.get_submodule(path) is not network:
        parent, _, name = path.rpartition(".")
        setattr(pl_module.get_submodule(parent), name, network)


def after_configure_model(pl_module: LightningModule, action: Callable[[], object]) -> Callable[[], None]:
    """Run `action` once, right after the LightningModule's `configure_model`, and return what calls that off.

    Of all hooks only `configure_model` comes after the module's own `setup` and before weights are loaded and the
    strategy wraps the model, and callbacks have no hook there; so for one call it is replaced on the instance.
    """

    def call_off() -> None:
        pl_module.__dict__.pop("configure_model", None)

    call_off()
    original = pl_module.configure_model

    def configure_model() -> None:
        call_off()
        original()
        action()

    pl_module.__dict__["configure_model"] = configure_model
    return call_off


def builds_layers_late(pl_module: LightningModule) -> bool:
    """Say whether the module may build layers after its constructor: it has its own `setup` or `configure_model`."""
    own = type(pl_module)
    return own.configure_model is not LightningModule.configure_model or own.setup is not LightningModule.setup


def _check_same_warehouses(network: nn.Module, recipe: Recipe) -> None:
    found = {warehouse.name for warehouse, _ in layers_of_warehouses(network)}
    asked = {name for warehouse in recipe.warehouses for name in warehouse.names}
    if recipe.stages is None and asked != found:
        raise KWError(
            f"the network is dynamic already, with the warehouses {', '.join(sorted(found))}; "
            f'recipe "{recipe.name}" asks for {", ".join(sorted(asked))}'
        )
