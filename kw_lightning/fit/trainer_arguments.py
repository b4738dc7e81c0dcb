"""The section `trainer` of a recipe: arguments of Lightning's Trainer that the recipe has no key for."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import Trainer

from kw_lightning.errors import RecipeError, mistake
from kw_lightning.recipe.types import Recipe

KEYS = {
    "accelerator": "train.accelerator",
    "devices": "train.devices",
    "strategy": "train.strategy",
    "num_nodes": "train.nodes",
    "precision": "train.precision",
    "max_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "gradient_clip_val": "train.gradient_clip",
    "accumulate_grad_batches": "train.accumulate",
    "deterministic": "train.deterministic",
    "log_every_n_steps": "log.every_n_steps",
    "logger": "log",
    "callbacks": "callbacks",
}
"""Arguments that a recipe gives by keys of its own."""
OBJECTS = ("plugins",)
"""Those that are Python objects."""
DECIDED = (
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"),
    *("default_root_dir", "fast_dev_run", "barebones", "model_registry", "reload_dataloaders_every_n_epochs"),
)
"""Those that kw-fit decides, for its run folder and its exact resume."""


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of section `trainer`.

    Raises:
        RecipeError: every one that the Trainer does not have, or that is given elsewhere.
    """
    known = set(inspect.signature(Trainer).parameters)
    allowed = sorted(known - KEYS.keys() - {*OBJECTS, *DECIDED})
    problems = []
    for name in recipe.trainer:
        if name in KEYS:
            message = f'"{name}" is the key {KEYS[name]} of a recipe: write it there'
        elif name in OBJECTS:
            message = (
                f'"{name}" takes Python objects, which a recipe cannot hold: give them to a Trainer of your own with '
                "KWCallback"
            )
        elif name in DECIDED:
            message = f'"{name}" is decided by kw-fit, whose run folder and resume depend on it'
        elif name not in known:
            names = [*allowed, *KEYS]
            message = mistake(name, ", ".join(allowed), what="the unknown argument of the Trainer", names=names)
        else:
            continue
        problems.append(recipe.document.problem(f"trainer.{name}", message))
    if problems:
        raise RecipeError(problems)
    return dict(recipe.trainer)
