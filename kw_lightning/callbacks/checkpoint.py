"""The recipe and the layout of the warehouses in a checkpoint, and loading a LightningModule by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from kw_lightning.callbacks.conversion import Source, callback_recipe, make_dynamic
from kw_lightning.callbacks.copies import copies_of
from kw_lightning.callbacks.layout import differences, dynamic_layers, dynamic_misfits, layout, listed
from kw_lightning.errors import KWError
from kw_lightning.recipe.types import Recipe
from kw_lightning.recipe.variables import escape

KEY = "kw_lightning"  # of a checkpoint: one entry for each network that a recipe made dynamic
Module = TypeVar("Module", bound=LightningModule)


def describe(recipe: Recipe, path: str | None, network: nn.Module, copies: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a checkpoint says about a network that a recipe made dynamic.

    Args:
        recipe: the recipe.
        path: of the part of the LightningModule that it is for.
        network: that part.
        copies: paths of its copies, dynamic as it is.
    """
    entry = {"recipe": escape(recipe.document.data), "module": path, "layout": layout(network)}
    return {**entry, "copies": list(copies)} if copies else entry


def class_names_of(trainer: Trainer) -> list[str] | None:
    """Return the names of the classes, where the Trainer's data module has any (`classes`)."""
    classes = getattr(getattr(trainer, "datamodule", None), "classes", None)
    return [str(name) for name in classes] if isinstance(classes, list | tuple) and classes else None


def load_from_checkpoint(
    cls: type[Module], path: str | Path, *, recipe: Source | None = None, module: str | None = None, **options: Any
) -> Module:
    """Load a LightningModule that was trained with KWCallback, as `cls.load_from_checkpoint` loads a static one.

    The module is made as ever, then its layers become dynamic as the recipe in the checkpoint says, and then the
    weights are loaded.

    Args:
        cls: the class of the module.
        path: the checkpoint.
        recipe: for a checkpoint without one (`save_weights_only`), or in the place of the one inside.
        module: path of the submodule that this recipe is for, as of KWCallback.
        **options: of `cls.load_from_checkpoint`, as `map_location`, `strict` and the arguments of `cls`.

    Raises:
        KWError: a checkpoint without a recipe, **or** whose warehouses are not those that the recipe gives.
        RecipeError: a recipe that does not fit the network.

    Example:
        >>> model = load_from_checkpoint(Classifier, "last.ckpt")
    """

    def convert(model: nn.Module, checkpoint: dict[str, Any]) -> None:
        stored: list[dict[str, Any]] = checkpoint.get(KEY, [])
        if not stored and recipe is None:
            if dynamic_layers(model):
                return
            raise KWError(
                f"{path} has no recipe, as checkpoints with save_weights_only: give it as recipe=..., "
                "with the module=... of its KWCallback"
            )
        for entry in stored or [{"recipe": recipe, "module": module, "layout": None}]:
            given = callback_recipe(recipe or entry["recipe"])
            copies = entry.get("copies", ()) if stored else copies_of(model, module)
            network = make_dynamic(model, given, entry["module"], copies=copies)
            loading.callback(refuse_other_weights(network))
            changed = differences(entry["layout"], layout(network)) if entry["layout"] else []
            if changed:
                raise KWError(f"the warehouses in {path} are not those of this network: {'; '.join(changed)}")

    with ExitStack() as loading, _before_loading(cls, convert):
        return cls.load_from_checkpoint(path, **options)


def refuse_other_weights(network: nn.Module) -> Callable[[], None]:
    """Make a dynamic network name what does not fit when weights of another one are loaded; return what ends that.

    Without it PyTorch lists every key of every layer.
    """
    return network.register_load_state_dict_pre_hook(_check_weights).remove


def _check_weights(network: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    # No closure, because networks are pickled while they are trained.
    misfits = dynamic_misfits(network, weights, prefix)
    if misfits:
        raise KWError(
            f"these weights were saved with another recipe, or with none: {listed(misfits)}. "
            "Static weights are loaded before the network is made dynamic, see warm_start"
        )


@contextmanager
def _before_loading(cls: type[LightningModule], action: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Run `action(module, checkpoint)` before the `on_load_checkpoint` of every `cls` that is loaded in this block.

    It is the one hook that Lightning calls between the constructor and the weights.
    """
    before = cls.__dict__.get("on_load_checkpoint")
    inherited = cls.on_load_checkpoint

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        action(self, checkpoint)
        inherited(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = before  # type: ignore[method-assign]
