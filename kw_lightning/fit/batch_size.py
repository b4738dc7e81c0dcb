"""`train.batch_size: auto`: as many images in a batch as the device's memory holds, found by Lightning's Tuner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.tuner.tuning import Tuner

from kw_lightning.errors import Problem, RecipeError, first_line
from kw_lightning.fit.data import data_module
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.quiet import quiet
from kw_lightning.fit.trainer import plain_trainer
from kw_lightning.planning import Plan
from kw_lightning.recipe.conversion import convert
from kw_lightning.recipe.types import Recipe, Train

log = logging.getLogger(__name__)

STEPS = 3
"""Optimizer steps with each size that is tried."""
LARGEST = 8192
"""The search ends there, or at the number of images; a CPU has memory for more than is of use."""


def is_open(recipe: Recipe) -> bool:
    """Tell whether a recipe leaves the size of a batch to be found."""
    return recipe.train is not None and recipe.train.batch_size == "auto"


def sized(
    source: Recipe | Plan, before: Mapping[str, Any] | None, *, allow_python: Sequence[str] = ()
) -> Recipe | Plan:
    """Return a recipe, or its plan, with the size of a batch in `data.batch_size` where it is to be found.

    It is doubled from 2 on until the memory is too small; a run that goes on keeps the size that it found. Learning
    rate and accumulation stay as they are.

    Args:
        source: the recipe or its plan; itself where nothing is to be found.
        before: the checkpoint that the run goes on from.
        allow_python: packages whose code the recipe may name.

    Raises:
        RecipeError: several devices, **or** data of one's own without an attribute `batch_size`.
        RunError: the data is not there.
    """
    recipe = source.recipe if isinstance(source, Plan) else source
    if not is_open(recipe):
        return source
    if before is not None:
        found = before["hyper_parameters"]["recipe"].get("data", {}).get("batch_size", 128)
    else:
        found = _found(source, allow_python)
        train = recipe.train or Train()
        log.warning(
            "train.batch_size: auto found %d images a batch; train.optimizer.lr, %g, and train.accumulate, %d, stay as "
            "they are",
            *(found, train.optimizer.lr, train.accumulate),
        )
    filled = with_batch_size(recipe, found)
    return replace(source, recipe=_same_warehouses(filled, recipe)) if isinstance(source, Plan) else filled


def with_batch_size(recipe: Recipe, number: int) -> Recipe:
    """Return a recipe that says how many images a batch has, in place of one that leaves it open."""
    document, train = recipe.document, recipe.document.data["train"]
    data = {
        **document.data,
        "data": {**document.data.get("data", {}), "batch_size": number},
        "train": {key: value for key, value in train.items() if key != "batch_size"},
    }
    return convert(data, replace(document, data=data))


def _same_warehouses(filled: Recipe, planned: Recipe) -> Recipe:
    """Return a recipe with the warehouses that its plan has found, for `stages: auto`."""
    return replace(filled, warehouses=planned.warehouses, stages=planned.stages)


def _found(source: Recipe | Plan, allow_python: Sequence[str]) -> int:
    """Return the largest size that trains for some steps, with a network of its own: none of it is left afterwards."""
    recipe = source.recipe if isinstance(source, Plan) else source
    module = Classifier(source, allow_python=allow_python, pretrained=False)
    data = data_module(recipe, allow_python=allow_python)
    with quiet(), TemporaryDirectory() as folder:
        trainer = plain_trainer(
            recipe, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
        )
        if trainer.world_size > 1:
            raise RecipeError(_problem(recipe, f"works on one device, and there are {trainer.world_size}"))
        _start_small(data)
        try:
            found = Tuner(trainer).scale_batch_size(
                module, datamodule=data, mode="power", steps_per_trial=STEPS, init_val=2, max_val=LARGEST
            )
        except MisconfigurationException as error:
            raise RecipeError(_problem(recipe, f"cannot be found: {first_line(error)}")) from error
    seed_everything((recipe.train or Train()).seed, workers=True, verbose=False)  # as if the number had been given
    return int(found or 2)


def _start_small(data: LightningDataModule) -> None:
    """Begin under the number of images: from it on Lightning does not look further."""
    if hasattr(data, "batch_size"):
        data.batch_size = 2


def _problem(recipe: Recipe, message: str) -> Problem:
    return recipe.document.problem("train.batch_size", f"auto {message}; give data.batch_size a number")
