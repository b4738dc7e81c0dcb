"""Metrics from a checkpoint alone: the recipe inside it gives the network and the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.callbacks.checkpoint_io import read
from kw_lightning.callbacks.layout import differences, layout, misfits
from kw_lightning.errors import RunError, argument, listed, mistake
from kw_lightning.fit.by_class import ClassMetrics
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.splitting import NOTHING, SPLIT, split_of
from kw_lightning.fit.failures import readable_failures
from kw_lightning.fit.folder import checkpoint_of
from kw_lightning.fit.foreign import as_of_kw_fit, guessed_preparation, is_foreign, without_download
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.quiet import quiet
from kw_lightning.fit.shapes import check_shapes
from kw_lightning.paths import user_path
from kw_lightning.planning import Plan
from kw_lightning.preprocessing import CLASSES, PREPROCESSING, Preprocessing, preprocessing
from kw_lightning.recipe import load_recipe

log = logging.getLogger(__name__)
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint reaches on a part of its data.

    Attributes:
        checkpoint: the file.
        split: the part, "train", "val" or "test".
        epoch: epochs trained, from 1.
        metrics: `accuracy`, `top5` of more than five classes (0 to 1) and `loss`; of several labels an image `map`,
            `f1`, `exact` and `loss`.
        classes: of each class `name`, `images`, `recall` and `precision`, of several labels `average_precision`.
    """

    checkpoint: Path
    split: str
    epoch: int
    metrics: dict[str, float]
    classes: tuple[ClassMetrics, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its network and the data that it is measured on.

    Attributes:
        checkpoint: the file.
        epoch: epochs trained, from 1.
        module: the network in its LightningModule.
        data: of its recipe; images are prepared as the network was evaluated in training.
        classes: their names in the order of the network's outputs, where they are known.
    """

    checkpoint: Path
    epoch: int
    module: Classifier
    data: LightningDataModule
    classes: tuple[str, ...]


def evaluate(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    allow_python: Sequence[str] = (),
    observers: Sequence[Callback] = (),
) -> Evaluation:
    """Evaluate a checkpoint file, or the chosen checkpoint of a run folder.

    Args:
        path: the file or folder; of `kw-fit`, **or** of a LightningModule with KWCallback that is a classifier.
        overrides: changes to the recipe inside, as `data.root=/elsewhere`. Images are prepared as the checkpoint says
            unless `data.eval` is changed. The recipe of a KWCallback may lack network and data; give them here.
        split: "train", "val" or "test"; by default "test" where there is one, else "val". If validation images were
            drawn, they are those of the run.
        allow_python: packages whose code the recipe may name.
        observers: callbacks that watch the pass.

    Raises:
        RunError: there is no checkpoint, it has no recipe, its weights do not fit the changed recipe, **or** the data,
            or that part of it, is not there.
        RecipeError: an override that cannot be used, a network that does not fit the data, **or** a Python package that
            is not allowed.
    """
    return evaluate_opened(open_checkpoint(path, overrides, allow_python=allow_python), split, observers)


def open_checkpoint(path: str | Path, overrides: Sequence[str] = (), *, allow_python: Sequence[str] = ()) -> Opened:
    """Build the network of a checkpoint and open its data; arguments and errors are those of `evaluate`."""
    checkpoint = checkpoint_of(user_path(path), chosen=True)
    found = read(checkpoint)
    if is_foreign(found):
        state = checked(as_of_kw_fit(found, checkpoint, overrides, allow_python=allow_python), checkpoint)
    else:
        state = checked(found, checkpoint)
        recipe = without_download(state["hyper_parameters"]["recipe"])
        changed = load_recipe(recipe, overrides) if overrides else recipe
        state = {**state, "hyper_parameters": {**state["hyper_parameters"], "recipe": changed}}
    trained = trained_preprocessing(state, checkpoint, overrides)
    module = load_classifier(state, checkpoint, allow_python=allow_python)
    if module.recipe.data is None:
        raise RunError(f"{checkpoint}: its recipe names no data: give it, as data.name=image_folder data.root=FOLDER")
    if is_foreign(found) and (guessed := guessed_preparation(state, module.recipe, preprocessing(module.recipe))):
        log.warning("%s does not say %s: data.eval", checkpoint, guessed)
    names = state.get(CLASSES)
    classes = [str(name) for name in names] if isinstance(names, list) else ()
    drawn = (split_of(state) or NOTHING) if SPLIT in state else None
    data = data_module(module.recipe, allow_python=allow_python, trained=trained, classes=classes, split=drawn)
    check_shapes(module.recipe, module, data)
    named = tuple(map(str, getattr(data, "classes", None) or classes))
    return Opened(checkpoint, state["epoch"] + 1, module, data, named)


def evaluate_opened(opened: Opened, split: str | None = None, observers: Sequence[Callback] = ()) -> Evaluation:
    """Measure a checkpoint on a part of its data; arguments and errors are those of `evaluate`."""
    module, data = opened.module, opened.data
    for part in _asked(split, parts_of(data)):
        if metrics := measure(module, data, part, observers):
            by_class = tuple(module.by_class(opened.classes))
            return Evaluation(opened.checkpoint, part, opened.epoch, metrics, by_class)
    if split is not None:
        raise RunError(f"the data has no {split} part: there are no images in it")
    train = argument("split", "train")
    raise RunError(f"the data has neither a test nor a validation part; {train} measures on what trains")


def parts_of(data: LightningDataModule) -> tuple[str, ...]:
    """Return which of "train", "val" and "test" a data module has; of one's own those that it has loaders for."""
    if isinstance(data, ImageData):
        return tuple(part for part in PARTS if part in data.parts)
    return tuple(part for part in PARTS if is_overridden(f"{part}_dataloader", data))


def _asked(asked: str | None, there: Sequence[str]) -> tuple[str, ...]:
    """Return the part that is asked for; where none is, those that are there, of which the first with images serves.

    Raises:
        RunError: the part that is asked for is not there.
    """
    if asked is None:
        return tuple(part for part in ("test", "val") if part in there)
    if asked not in PARTS:
        raise RunError(mistake(asked, PARTS, what="the unknown split"))
    if asked not in there:
        raise RunError(
            f"the data has no {asked} part: found {argument('split', asked)}, allowed: {', '.join(there) or 'none'}"
        )
    return (asked,)


def measure(
    module: Classifier, data: LightningDataModule, part: str, observers: Sequence[Callback] = ()
) -> dict[str, float]:
    """Return the metrics that `Evaluation` holds, over a part of the data, on one device; none where it has no images.

    Images that trained are measured as they are evaluated, not augmented; `observers` are callbacks that watch.
    """
    with quiet(), readable_failures():
        trainer = Trainer(
            # the kind of device that trained need not be here
            accelerator="cpu" if module.train_settings.accelerator == "cpu" else "auto",
            devices=1,
            precision=module.train_settings.precision,  # type: ignore[arg-type]
            callbacks=[*observers],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run = trainer.test if part == "test" else trainer.validate
        results = run(module, _source(data, part), verbose=False)
    if not results:  # data of one's own may have an empty list of loaders
        return {}
    metrics = results[0]
    of_one = ("accuracy", "top5", "loss") if module.shows_top5 else ("accuracy", "loss")
    names = ("map", "f1", "exact", "loss") if module.several else of_one
    prefix = "test" if part == "test" else "val"
    return {name: metrics[f"{prefix}/{name}"] for name in names}


def _source(data: LightningDataModule, part: str) -> Any:
    """Return what a Trainer takes for the images of a part: a loader, **or** a data module."""
    if isinstance(data, ImageData):
        return data.evaluation_loader(part)
    if part != "train":
        return data
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `kw-fit`, without running code from it.

    Raises:
        RunError: it cannot be read, **or** `kw-fit` did not write it.
    """
    return checked(read(path), path)


def checked(state: Any, path: Path) -> dict[str, Any]:
    """Return what was read as a checkpoint of `kw-fit`.

    Raises:
        RunError: it is none.
    """
    parameters = state.get("hyper_parameters") if isinstance(state, dict) else None
    # A text would be the name of a file, and the file of the checkpoint's choice.
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("recipe"), Mapping):
        raise RunError(f"{path}: no recipe inside; only checkpoints that kw-fit wrote can be used here")
    weights = state.get("state_dict")
    whole = isinstance(weights, Mapping) and all(isinstance(value, Tensor) for value in weights.values())
    if not whole or not all(type(state.get(count)) is int for count in ("epoch", "global_step")):
        raise RunError(f"{path}: no weights inside, or not how far they are trained; kw-fit writes both")
    return state


def trained_preprocessing(state: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> Preprocessing | None:
    """Return how a checkpoint's network had its images prepared in evaluation.

    Args:
        state: the checkpoint.
        path: its file, for messages.
        overrides: changes to the recipe inside.

    Returns:
        None where the checkpoint does not say it, **or** `data.eval` was changed: then it is as the recipe says.

    Raises:
        RunError: it says what kw-fit does not write.
    """
    steps = state.get(PREPROCESSING)
    if not isinstance(steps, Mapping) or any(each.startswith(("data.eval.", "data.eval=")) for each in overrides):
        return None
    try:
        return Preprocessing.from_dict(steps)
    except ValueError as error:
        raise RunError(f"{path}: damaged, or not of kw-fit: {error}") from None


def load_classifier(
    state: dict[str, Any], path: Path, *, planned: Plan | None = None, allow_python: Sequence[str] = ()
) -> Classifier:
    """Build the network of a checkpoint's recipe and fill it with the checkpoint's weights.

    Args:
        state: the checkpoint.
        path: its file, for messages.
        planned: the plan of its recipe, where there is one.
        allow_python: packages whose code the recipe may name.

    Raises:
        RunError: the weights do not fit the network, **or** its warehouses are shared out otherwise.
    """
    module = Classifier(planned or state["hyper_parameters"]["recipe"], allow_python=allow_python, pretrained=False)
    found = misfits(module, state["state_dict"])
    if found:
        raise RunError(f"{path}: the weights do not fit the recipe inside: {listed(found, between='; ')}")
    check_layout(state, path, module.network)
    module.load_state_dict(state["state_dict"])
    return module


def check_layout(state: Mapping[str, Any], path: Path, network: nn.Module) -> None:
    """Compare which cells the layers of a network draw with what the checkpoint says, which shapes alone do not tell.

    Raises:
        RunError: they are others.
    """
    try:
        expected = state[KEY][0]["layout"] if state.get(KEY) else None
        found = differences(expected, layout(network)) if expected else []
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: damaged, or not of kw-fit: its layout of the warehouses cannot be read") from error
    if found:
        raise RunError(f"{path}: the warehouses are not those of the recipe inside: {listed(found, between='; ')}")
