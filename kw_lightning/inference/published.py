"""The authors' checkpoints as saved networks, and saved networks as the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path

from kw_lightning.builder import build
from kw_lightning.errors import RunError
from kw_lightning.inference.classifier import ImageClassifier
from kw_lightning.inference.fitting import fitting_recipe
from kw_lightning.inference.saving import SavedNetwork, class_names
from kw_lightning.preprocessing import Preprocessing, preprocessing
from kw_lightning.published import (
    backbone_tensors,
    load_published,
    misfit,
    published_entries,
    read_published,
    write_published,
)
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe


def import_checkpoint(
    file: Path,
    folder: Path,
    recipe: str | None = None,
    *,
    temperature: float = 0.0,
    averaged: bool = False,
    backbone_only: bool = False,
) -> str:
    """Write the network of an authors' checkpoint to a folder, see `ImageClassifier.save_pretrained`.

    Args:
        file: the checkpoint.
        folder: to write to.
        recipe: the checkpoint's; None takes the published one that fits.
        temperature: τ, which such checkpoints do not hold.
        averaged: take the averaged weights.
        backbone_only: the checkpoint is a detector's, whose backbone is wanted; the classifier keeps its start values.

    Returns:
        The recipe's name.

    Raises:
        RunError: a file that cannot be read, **or** one that does not fit; the published recipe that does is named.
        RecipeError: a recipe that cannot be used.
    """
    tensors = read_published(file, averaged=averaged)
    if backbone_only:
        tensors = backbone_tensors(tensors)
    name = recipe or fitting_recipe(tensors, backbone_only=backbone_only)
    if name is None:
        raise RunError(f"{file} fits none of the published configurations; name its recipe with --recipe")
    loaded = load_recipe(name)
    network = build(loaded, pretrained=False)
    fault = misfit(published_entries(network, backbone_of(loaded)), tensors, backbone_only=backbone_only)
    if fault:
        other = fitting_recipe(tensors, backbone_only=backbone_only)
        hint = f"; it fits the recipe {other}" if other else "; it fits none of the published configurations either"
        raise RunError(f"{file} does not fit the recipe {loaded.name}: {fault}{hint}")
    load_published(network, backbone_of(loaded), tensors, temperature=temperature, backbone_only=backbone_only)
    steps = preprocessing(loaded) or Preprocessing()
    classes = class_names(network)
    ImageClassifier(SavedNetwork(network.eval(), loaded, steps, classes)).save_pretrained(folder)
    return loaded.name


def export_checkpoint(classifier: ImageClassifier, file: Path) -> None:
    """Write a network as a checkpoint in the authors' layout.

    Raises:
        RunError: a network that the authors have not published, **or** a file that cannot be written.
    """
    write_published(classifier.network, backbone_of(classifier.saved.recipe), file)


def backbone_of(recipe: Recipe) -> str:
    """Return the backbone that a recipe names.

    Raises:
        RunError: it names none.
    """
    if recipe.model is None or recipe.model.backbone is None:
        raise RunError(f"the recipe {recipe.name} has no model.backbone; the authors' networks are backbones by name")
    return recipe.model.backbone
