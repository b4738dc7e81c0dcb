"""Optimizers of `torch.optim` and schedules of `torch.optim.lr_scheduler`, from the recipe."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from kw_lightning.errors import RecipeError, first_line, mistake, sentence
from kw_lightning.recipe.types import Recipe, Schedule, Train

log = logging.getLogger(__name__)

_ARGUMENTS = {"step": ("step_size", "gamma")}
"""What `train.schedule.args` may give a schedule; the others are wholly told by their keys."""

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers that have a kernel for a whole step: on a CPU AdamW takes an eighth of the time by it."""
_WAYS = {"fused", "foreach", "differentiable", "capturable"}
"""Arguments by which a recipe says how to step."""
_FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> Optimizer:
    """Return the recipe's optimizer.

    Args:
        recipe: its `train.optimizer` is used.
        parameters: parameters, or groups of them (`parameter_groups`).

    Raises:
        RecipeError: `torch.optim` has no such optimizer, **or** it does not take an argument.
    """
    train = recipe.train or Train()
    wanted = train.optimizer
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if wanted.name not in classes:
        message = mistake(wanted.name, classes, what="the unknown optimizer")
        raise RecipeError(recipe.document.problem("train.optimizer.name", message))
    chosen = classes[wanted.name]
    allowed = [name for name in inspect.signature(chosen).parameters if name != "params"]
    args = {"lr": wanted.lr, "weight_decay": wanted.weight_decay, **wanted.args}
    if not wanted.weight_decay:
        args.pop("weight_decay")  # some optimizers do not have it
    others = recipe.document.data.get("train", {}).get("optimizer", {}).get("args") or {}
    problems = [
        recipe.document.problem(
            f"train.optimizer.{'args.' if key in others else ''}{key}",
            mistake(key, allowed, what="the unknown argument"),
        )
        for key in args
        if key not in allowed
    ]
    if problems:
        raise RecipeError(problems)
    clips = train.precision.endswith("-mixed") and bool(train.gradient_clip)  # which Lightning refuses for fused ones
    if args.get("fused") and clips:
        message = sentence(
            f"true with train.gradient_clip in {train.precision}", "one of the two: Lightning refuses both"
        )
        raise RecipeError(recipe.document.problem("train.optimizer.args.fused", message))
    given: Any = list(parameters)
    if not clips and chosen in _FUSED and not args.keys() & _WAYS and _can_be_fused(train, given):
        args["fused"] = True
    try:
        optimizer: Optimizer = chosen(given, **args)
    except (TypeError, ValueError, RuntimeError) as error:  # the optimizer's own checks of its values
        raise RecipeError(recipe.document.problem("train.optimizer", f"{wanted.name}: {first_line(error)}")) from error
    return optimizer


def _can_be_fused(train: Train, parameters: list[Any]) -> bool:
    """Return whether parameters, or groups of them, can be stepped by one kernel; not where gradients are scaled."""
    if train.precision == "16-mixed":
        return False
    groups = [one["params"] if isinstance(one, dict) else [one] for one in parameters]
    return all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for group in groups for p in group)


def make_schedule(recipe: Recipe, optimizer: Optimizer, total_steps: int, steps_per_epoch: float) -> LRScheduler:
    """Return the learning rate over the run, to be stepped once an optimizer step.

    Args:
        recipe: its `train.schedule` is used.
        optimizer: the optimizer, its learning rate the schedule's highest.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        RecipeError: arguments that the schedule does not take.
    """
    wanted = (recipe.train or Train()).schedule
    allowed = _ARGUMENTS.get(wanted.name, ())
    problems = []
    for key, value in wanted.args.items():
        known = key in allowed
        if not known or not isinstance(value, int | float):
            message = mistake(value, "a number") if known else mistake(key, allowed, what="the unknown argument")
            problems.append(recipe.document.problem(f"train.schedule.args.{key}", message))
    if problems:
        raise RecipeError(problems)
    warmup = min(round(wanted.warmup_epochs * steps_per_epoch), total_steps)
    after = _shape(wanted, optimizer, max(total_steps - warmup, 1), steps_per_epoch)
    if warmup == 0:
        return after
    rise = lr_scheduler.LambdaLR(optimizer, lambda step: min(step / warmup, 1.0))
    return lr_scheduler.SequentialLR(optimizer, [rise, after], milestones=[warmup])


def warn_of_a_short_run(recipe: Recipe) -> None:
    """Log what of a training would begin, or end, after its last epoch."""
    train = recipe.train or Train()
    for path, epochs, what in (
        ("train.schedule.warmup_epochs", train.schedule.warmup_epochs, "the learning rate is still rising"),
        ("train.ema.start_epoch", train.ema.start_epoch + 1 if train.ema else 0, "nothing is averaged"),
    ):
        if epochs > train.epochs > 0:
            epochs_of_run = f"{train.epochs} epoch{'s' if train.epochs > 1 else ''}"
            log.warning("%s", recipe.document.problem(path, f"{what} when the run ends, after {epochs_of_run}"))


def _shape(schedule: Schedule, optimizer: Optimizer, steps: int, steps_per_epoch: float) -> LRScheduler:
    args: dict[str, Any] = dict(schedule.args)
    if schedule.name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=schedule.final_lr, **args)
    if schedule.name == "linear":
        highest = max(group["lr"] for group in optimizer.param_groups)
        final = schedule.final_lr / highest if highest else 1.0
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=final, total_iters=steps, **args)
    if schedule.name == "step":
        epochs = args.pop("step_size", 30)  # in epochs, as people think of it
        return lr_scheduler.StepLR(optimizer, step_size=max(round(epochs * steps_per_epoch), 1), **args)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1, **args)
