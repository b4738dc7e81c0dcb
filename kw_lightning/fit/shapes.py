"""Whether the network of a recipe takes the images of its data, and answers in its classes."""

from __future__ import annotations

import logging

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kw_lightning.errors import KWError, RecipeError, first_line
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.failures import readable_failures
from kw_lightning.fit.interruption import is_first_process
from kw_lightning.fit.module import Classifier
from kw_lightning.recipe.types import Recipe

log = logging.getLogger(__name__)


def check_shapes(recipe: Recipe, module: Classifier, data: LightningDataModule) -> None:
    """Show the network one image before anything is written, so that a mismatch is one message.

    A network that ends in a softmax brings a warning: the loss takes one itself, and after two training is slow.

    Raises:
        RecipeError: the network does not take such images, gives no tensor, **or** has other outputs than the data has
            classes.
        RunError: the memory is too small for one image.
    """
    if not isinstance(data, ImageData):
        return
    image = data.first()
    shape = list(image.shape)
    try:
        with readable_failures(), torch.inference_mode():
            logits = module.eval()(image.unsqueeze(0))
    except KWError:  # memory that is too small, or an output of another kind, is no fault of the images
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        message = f"the network does not take the images of the data, {shape}: {first_line(error)}"
        raise RecipeError(recipe.document.problem("model", message)) from error
    finally:
        module.train()
    if logits.ndim != 2 or logits.shape[1] != data.num_classes:
        found = f"{logits.shape[1]} outputs" if logits.ndim == 2 else f"an output of {list(logits.shape[1:])} a sample"
        path, cure = _where_classes_are_set(recipe, data.num_classes)
        message = f"the network has {found} and the data has {data.num_classes} classes: {cure}"
        raise RecipeError(recipe.document.problem(path, message))
    if is_first_process() and _are_probabilities(logits):
        log.warning("model: the network ends in a softmax, which losses and predictions take once more: leave it out")


def _are_probabilities(logits: Tensor) -> bool:  # [1 x k]
    total = logits.double().sum(dim=1)
    return (
        logits.shape[1] > 1 and bool((logits >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)
    )


def _where_classes_are_set(recipe: Recipe, classes: int) -> tuple[str, str]:
    """Return the key path of the network's number of outputs, and what to write there."""
    model = recipe.model
    if model is not None and model.layers:
        return "model.layers", f"give the last layer of model.layers {classes} units"
    if model is not None and (model.backbone or "").startswith("python:") and "num_classes" not in model.args:
        return "model.args", f"give its constructor the {classes} classes by model.args"
    return "model.args.num_classes", f"set model.args.num_classes to {classes}"
