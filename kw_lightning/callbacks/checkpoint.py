"""The recipe and the layout of the warehouses in a checkpoint, and loading a LightningModule by them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from kw_lightning.callbacks.checkpoint_io import VERSION, verify
from kw_lightning.callbacks.conversion import Source, callback_recipe, make_dynamic
from kw_lightning.callbacks.copies import copies_of
from kw_lightning.callbacks.layout import differences, dynamic_layers, dynamic_misfits, layout
from kw_lightning.errors import KWError, RunError, kind, listed, sentence
from kw_lightning.recipe.types import Recipe
from kw_lightning.recipe.variables import escape

KEYS = ("state_dict", VERSION)  # of every checkpoint of Lightning
KEY = "kw_lightning"  # of a checkpoint: one entry for each network that a recipe made dynamic
Module = TypeVar("Module", bound=LightningModule)
Action = Callable[[LightningModule, dict[str, Any]], None]


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
    weights are loaded. A checkpoint of a static network is loaded as such.

    Args:
        cls: the class of the module; also LightningModule where LightningCLI trained it in subclass mode.
        path: the checkpoint.
        recipe: for a checkpoint without one (`save_weights_only`), or in the place of the one inside.
        module: path of the submodule that this recipe is for, as of KWCallback.
        **options: of `cls.load_from_checkpoint`, as `map_location`, `strict` and the arguments of `cls`; code in the
            file is only run with `weights_only=False`.

    Raises:
        KWError: a checkpoint without a recipe, **or** whose warehouses are not those that the recipe gives.
        RecipeError: a recipe that does not fit the network.
        RunError: a file that is damaged or no checkpoint of Lightning, **or** a folder of shards.
        TypeError: `cls` is no class of LightningModules.

    Example:
        >>> model = load_from_checkpoint(Classifier, "last.ckpt")
    """

    def convert(model: LightningModule, checkpoint: dict[str, Any]) -> None:
        stored: list[dict[str, Any]] = checkpoint.get(KEY, [])
        if not stored and recipe is None:
            if dynamic_layers(model) or not any(name.endswith(".warehouse.cells") for name in checkpoint["state_dict"]):
                return  # dynamic by itself, or static as its weights
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

    if not (isinstance(cls, type) and issubclass(cls, LightningModule)):
        raise TypeError(sentence(kind(cls), "a class that is a LightningModule"))
    if str(path).startswith("http"):
        options.setdefault("weights_only", True)  # Lightning runs the code of a file from elsewhere unless told
    elif isinstance(path, str | os.PathLike):
        _check_file(Path(path), options.get("weights_only"))
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
            f"these weights were saved with another recipe, or with none: {listed(misfits, between='; ')}. "
            "Static weights are loaded before the network is made dynamic, see warm_start"
        )


def _check_file(path: Path, weights_only: bool | None) -> None:
    """Refuse what Lightning reads into an error from its inside; what lies elsewhere (`s3://…`) is left to it."""
    if path.is_dir():
        raise RunError(
            f"{path}: found a folder, allowed: one file; a checkpoint in shards is loaded by its strategy, as "
            "ckpt_path of the Trainer, and ModelParallelStrategy(save_distributed_checkpoint=False) saves whole ones"
        )
    if path.is_file():
        verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)  # reads no weights
        missing = [key for key in KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
        if missing:
            raise RunError(f"{path}: not a checkpoint of Lightning, which has {' and '.join(missing)}")


@contextmanager
def _before_loading(cls: type[LightningModule], action: Action) -> Iterator[None]:
    """Run `action(module, checkpoint)` before the `on_load_checkpoint` of every `cls` that is loaded in this block.

    It is the one hook that Lightning calls between the constructor and the weights. A checkpoint of LightningCLI may
    name a subclass to load, which may have that hook anew.
    """
    done: set[LightningModule] = set()

    def act(module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if module not in done:  # hooks call that of their base
            done.add(module)
            action(module, checkpoint)

    with ExitStack() as patches:
        for owner in (cls, *(child for child in _subclasses(cls) if "on_load_checkpoint" in vars(child))):
            patches.callback(_put_before(owner, act))
        yield


def _put_before(cls: type[LightningModule], action: Action) -> Callable[[], None]:
    """Run `action(module, checkpoint)` before the `on_load_checkpoint` of a class; return what ends that."""
    before = vars(cls).get("on_load_checkpoint")
    inherited = cls.on_load_checkpoint

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        action(self, checkpoint)
        inherited(self, checkpoint)

    def end() -> None:
        if before is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = before  # type: ignore[method-assign]

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign, assignment]
    return end


def _subclasses(cls: type[LightningModule]) -> set[type[LightningModule]]:
    direct = set(cls.__subclasses__())
    return direct.union(*map(_subclasses, direct))
