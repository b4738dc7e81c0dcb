"""How much each class counts in the loss, by the recipe's `train.class_weights` and the data."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kw_lightning.errors import RecipeError, listed, mistake
from kw_lightning.recipe.nodes import join
from kw_lightning.recipe.types import Recipe, Train

SHOWN = 20
"""Names of classes that a message counts up."""


def class_weights(recipe: Recipe, data: LightningDataModule | None) -> Tensor | None:  # [k]
    """Return the weight of each class; None where the recipe gives none.

    `balanced` is n / (k · c) for a class with c of n training images, of k classes: then all count the same.

    Args:
        recipe: the recipe.
        data: its data module; one's own needs `class_counts`, of `balanced`, or `classes`, their names.

    Raises:
        RecipeError: the name of no class, **or** data that does not say what is needed.
    """
    wanted = (recipe.train or Train()).class_weights
    if wanted is None:
        return None
    if wanted == "balanced":
        if (found := getattr(data, "class_counts", None)) is None:
            raise _lacking(recipe, "class_counts")
        counts = torch.as_tensor(found, dtype=torch.float64)
        return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()
    names = [str(name) for name in getattr(data, "classes", None) or range(getattr(data, "num_classes", 0))]
    if not names:
        raise _lacking(recipe, "classes")
    allowed = listed(names, SHOWN)
    problems = [
        recipe.document.problem(
            join("train.class_weights", name), mistake(name, allowed, what="the unknown class", names=names)
        )
        for name in wanted
        if name not in names
    ]
    if problems:
        raise RecipeError(problems)
    return torch.tensor([wanted.get(name, 1.0) for name in names])


def _lacking(recipe: Recipe, attribute: str) -> RecipeError:
    message = f"this takes the attribute {attribute} of the data, which a data module of one's own has to give it"
    return RecipeError(recipe.document.problem("train.class_weights", message))
