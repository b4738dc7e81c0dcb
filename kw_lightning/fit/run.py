"""Training from a recipe: put its parts together, claim the run folder, train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything

from kw_lightning.errors import Problem, RecipeError, RunError, argument, mistake
from kw_lightning.fit.batch_size import is_open, sized
from kw_lightning.fit.classes import resolved
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.splitting import Split, split_of
from kw_lightning.fit.distillation import find_teacher
from kw_lightning.fit.early_stopping import check_stopping
from kw_lightning.fit.ending import Result, finish
from kw_lightning.fit.evaluation import parts_of, read_checkpoint
from kw_lightning.fit.failures import readable_failures, readable_training
from kw_lightning.fit.folder import RECIPE_FILE, SPLIT_FILE, checkpoint_of, readable_errors, versions
from kw_lightning.fit.groups import parameter_groups
from kw_lightning.fit.interruption import interruptible, is_first_process
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.optimization import make_optimizer, make_schedule, warn_of_a_short_run
from kw_lightning.fit.own_callbacks import own_callbacks
from kw_lightning.fit.quiet import quiet
from kw_lightning.fit.report import json_text
from kw_lightning.fit.resuming import check_fits, prepare
from kw_lightning.fit.shapes import check_shapes
from kw_lightning.fit.starting import Restoring, Start, goes_on_from, start
from kw_lightning.fit.trackers import check_installed, end_trackers
from kw_lightning.fit.trainer import OnNan, check_names, check_settings, make_trainer, monitored
from kw_lightning.fit.weighting import class_weights
from kw_lightning.paths import user_path
from kw_lightning.planning import Plan
from kw_lightning.preprocessing import warn_of_contradictions
from kw_lightning.recipe import load_recipe, lock_text
from kw_lightning.recipe.types import Recipe, Train

log = logging.getLogger(__name__)


def fit(
    recipe: Plan | Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: str | Path | None = None,
    init: str | Path | None = None,
    output: str | Path | None = None,
    allow_python: Sequence[str] = (),
    on_nan: OnNan = "stop",
) -> Result:
    """Train the network of a recipe.

    Args:
        recipe: a recipe, its plan, or what `load_recipe` takes; a plan is executed as it stands.
        overrides: changes to the recipe, as `train.epochs=5`.
        resume: "auto" for the newest run of the recipe if there is one, a run folder or a checkpoint file.
        init: a run folder or a checkpoint file whose weights a new run begins with; with `resume="auto"` only where
            there is nothing to go on from.
        output: the run folder; by default `runs/NAME-1`, `-2`, …
        allow_python: packages whose code the recipe may name.
        on_nan: "stop" at the first loss that is not a number, or "warn".

    Raises:
        RecipeError: a recipe that cannot be used.
        NonFiniteError: a loss that is infinite or not a number; `checkpoints/last.ckpt` is the last finite one.
        RunError: a folder that is in use or holds another run, a full disk, data that is not there.
        KeyboardInterrupt: Ctrl-C; `checkpoints/last.ckpt` holds the state of the last batch, to go on to the bit.
        InterruptedRunError: SIGTERM, or SIGHUP of a terminal that is closed; the same.

    Example:
        >>> result = fit("digits-resnet", ["train.epochs=1"])
        >>> result.test["accuracy"]
    """
    if not isinstance(recipe, Plan | Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise TypeError("overrides change a recipe while it is loaded, and this one is loaded already")
    source, recipe = recipe, recipe.recipe if isinstance(recipe, Plan) else recipe
    seed_everything((recipe.train or Train()).seed, workers=True, verbose=False)
    check_training(recipe)
    check_installed(recipe)
    with readable_failures():
        recipe = resolved(recipe, allow_python=allow_python)
        planned = source if isinstance(source, Plan) else recipe
        if is_open(recipe):
            planned = sized(planned, goes_on_from(recipe, resume, output)[2], allow_python=allow_python)
            recipe = planned.recipe if isinstance(planned, Plan) else planned
        module, data, own = make_parts(recipe, planned, pretrained=init is None, allow_python=allow_python)
    if is_first_process():
        warn_of_contradictions(recipe)
        warn_of_a_short_run(recipe)
    if init is not None and resume not in (None, "auto"):
        both = f"{argument('init')} begins a new run and {argument('resume')} goes on with one"
        raise RunError(f"{both}: give one of them")
    begun = start(recipe, resume, output)
    folder, restoring = begun.folder, Restoring(begun.checkpoint)
    try:
        with quiet(), folder.watched(), readable_errors(folder.path), interruptible(folder):
            with restoring.readable(), readable_training():
                data, changes = begin(recipe, module, data, begun, init)
                more = [*changes, restoring, *own]
                validates = "val" in parts_of(data)
                trainer = make_trainer(recipe, folder, begun.state, on_nan=on_nan, more=more, validates=validates)
                if trainer.is_global_zero:
                    write_beginning(recipe, data, begun)
                trainer.fit(module, data, ckpt_path=begun.checkpoint, weights_only=True)
            return finish(trainer, module, data, folder, allow_python)
    finally:
        end_trackers(recipe)
        folder.release()


def make_parts(
    recipe: Recipe, planned: Plan | Recipe, *, pretrained: bool = True, allow_python: Sequence[str] = ()
) -> tuple[Classifier, LightningDataModule, list[Callback]]:
    """Return what a run trains with: network, data and callbacks of one's own, compared with each other.

    Args:
        recipe: the recipe, its classes known.
        planned: the same, or its plan, which is then executed as it stands.
        pretrained: whether to fill the network with the weights that the recipe names.
        allow_python: packages whose code the recipe may name.

    Raises:
        RecipeError: whatever in the recipe fits neither network nor data.
        RunError: data or weights that are not there.
    """
    module = Classifier(planned, allow_python=allow_python, pretrained=pretrained)
    data = data_module(recipe, allow_python=allow_python)
    make_optimizer(recipe, parameter_groups(recipe, module.network))  # its mistakes, before a folder is made
    check_shapes(recipe, module, data)
    class_weights(recipe, data)
    own = own_callbacks(recipe, allow_python=allow_python)
    check_stopping(recipe, parts_of(data))
    module.teacher = find_teacher(recipe, data, allow_python=allow_python)
    return module, data, own


def begin(
    recipe: Recipe, module: Classifier, data: LightningDataModule, begun: Start, init: str | Path | None
) -> tuple[LightningDataModule, list[Callback]]:
    """Fill the network where `init` asks for it, and return the data as it was divided before.

    Before is in the run that goes on, **or** in the one whose weights a new run begins with, of the same data:
    an image that they were trained on must not validate them.

    Returns:
        The data, and callbacks for what a resumed run does otherwise than before.

    Raises:
        RunError: a checkpoint that cannot be read, weights of another network, a change that a resume cannot make, a
            checkpoint that does not say which images validated, **or** data that is not there.
    """
    if begun.state is not None:
        return with_split(recipe, data, split_of(begun.state)), prepare(recipe, module, begun)
    if init is None:
        return with_split(recipe, data, None), []
    checkpoint = checkpoint_of(user_path(init))
    state = read_checkpoint(checkpoint)
    check_fits(module, state, checkpoint)
    module.load_state_dict(state["state_dict"])
    return with_split(recipe, data, split_of(state) if _of_same_data(state, recipe) else None), []


def _of_same_data(state: Mapping[str, Any], recipe: Recipe) -> bool:
    """Tell whether a checkpoint's run had the data of a recipe, and divided it alike."""
    found = (state["hyper_parameters"]["recipe"].get("data"), recipe.document.data.get("data"))
    theirs, own = (data if isinstance(data, Mapping) else {} for data in found)
    return all(theirs.get(key) == own.get(key) for key in ("name", "root", "args", "validation"))


def with_split(recipe: Recipe, data: LightningDataModule, before: Split | None) -> LightningDataModule:
    """Return the data of a run, with the very images that validated before; say what is to be said.

    Raises:
        RunError: the data is not there.
    """
    if not isinstance(data, ImageData):
        return data
    if before is not None and before != data.split:
        data = ImageData(recipe, split=before)
    for note in data.notes if is_first_process() else ():
        log.warning(note)
    return data


def write_beginning(recipe: Recipe, data: LightningDataModule, begun: Start) -> None:
    """Write what the run folder holds from the beginning: recipe, split and versions."""
    folder = begun.folder
    if begun.state is None:
        folder.write(RECIPE_FILE, lock_text(recipe))
    if isinstance(data, ImageData) and data.split is not None:
        folder.write(SPLIT_FILE, json_text(data.split.to_dict()) + "\n")
    folder.write("versions.json", versions())


def check_training(recipe: Recipe, *, here: bool = True) -> None:
    """Check optimizer, schedule, monitored metric and devices before anything is built or written.

    Args:
        recipe: the recipe.
        here: whether it is to be trained on this machine, which has to have its devices.

    Raises:
        RecipeError: every mistake found.
    """
    problems: list[Problem] = []
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        make_schedule(recipe, make_optimizer(recipe, [parameter]), total_steps=100, steps_per_epoch=10)
    except RecipeError as error:
        problems += error.problems
    monitor = (recipe.train or Train()).monitor
    if monitor not in monitored(recipe):
        message = mistake(monitor, monitored(recipe), what="the unknown metric")
        problems.append(recipe.document.problem("train.monitor", message))
    try:
        (check_settings if here else check_names)(recipe)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)


def check_layers(planned: Plan, *, allow_python: Sequence[str] = ()) -> None:
    """Check the layers that `train` names, by the network on the meta device.

    Raises:
        RecipeError: one that is not there.
    """
    with torch.device("meta"):
        module = Classifier(planned, allow_python=allow_python, pretrained=False)
        parameter_groups(planned.recipe, module.network)
