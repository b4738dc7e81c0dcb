"""Learning from a network that is trained already: its answers to an image are targets beside those of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional

from kw_lightning.errors import RecipeError, RunError, first_line, listed, sentence
from kw_lightning.fit.data import ImageData
from kw_lightning.preprocessing import Preprocessing, preprocessing
from kw_lightning.recipe.types import Distillation, Recipe, Train


class Teacher:
    """A trained network that is asked about the images of a batch as its student sees them; it learns nothing.

    It is no module of the student's: neither checkpoints nor averages of the weights hold it.

    Args:
        network: images to logits, in evaluation mode.
        columns: which of its logits belong to the student's classes, in their order; None for all as they are.
        seen: how images were prepared for the network.
        shown: how they are prepared for the student.
    """

    def __init__(
        self, network: nn.Module, columns: Tensor | None, seen: Preprocessing | None, shown: Preprocessing | None
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.columns = columns
        wanted, given = _normalisation(seen), _normalisation(shown)
        self.renormalised = None if torch.equal(*torch.broadcast_tensors(wanted, given)) else (wanted, given)

    def to(self, device: torch.device) -> Teacher:
        """Move it to a device."""
        self.network.to(device)
        self.columns = None if self.columns is None else self.columns.to(device)
        if self.renormalised is not None:
            wanted, given = self.renormalised
            self.renormalised = wanted.to(device), given.to(device)
        return self

    def __deepcopy__(self, memo: object) -> Teacher:
        """Return itself: one is enough for all copies of the student."""
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:  # [b x c x h x w] -> [b x k]
        """Return the logits of the student's classes."""
        if self.renormalised is not None:
            wanted, given = self.renormalised  # each [mean and std x c x 1 x 1]
            images = (images * given[1] + given[0] - wanted[0]) / wanted[1]
        weight = next(self.network.parameters(), images)
        logits: Tensor = self.network(images.to(weight.dtype))
        return logits if self.columns is None else logits[:, self.columns]


def find_teacher(
    recipe: Recipe, data: LightningDataModule | None, *, allow_python: Sequence[str] = ()
) -> Teacher | None:
    """Return the teacher that a recipe names; None where it names none.

    Args:
        recipe: the recipe.
        data: its data module, whose classes the teacher has to know; None where that is not to be seen.
        allow_python: packages whose code the teacher's recipe may name.

    Raises:
        RunError: no trained network there.
        RecipeError: one that does not know the classes or take the images, **or** that was trained for one label and
            not for several.
    """
    wanted = (recipe.train or Train()).distill
    if wanted is None:
        return None
    from kw_lightning.inference import load  # it reads images by `fit.data`: at the top this would be a circle

    try:
        saved = load(wanted.teacher, allow_python=allow_python).saved
    except RunError as error:
        problem = recipe.document.problem("train.distill.teacher", str(error))
        raise RunError(str(problem)) from error
    if saved.several != recipe.several:
        found = "several labels" if saved.several else "one label"
        own = "several, as data.labels says" if recipe.several else "one"
        raise _unfit(recipe, sentence(f"a teacher of {found} an image", own))
    columns = None
    names = tuple(map(str, getattr(data, "classes", None) or ()))
    if names and names != saved.classes:
        lacking = [name for name in names if name not in saved.classes]
        if lacking:
            raise _unfit(recipe, f"the teacher does not know the classes {listed(lacking)}")
        columns = torch.tensor([saved.classes.index(name) for name in names])
    elif not names and len(saved.classes) != (classes := getattr(data, "num_classes", len(saved.classes))):
        raise _unfit(recipe, f"the teacher has {len(saved.classes)} classes and the data {classes}")
    teacher = Teacher(saved.network, columns, saved.preprocessing, preprocessing(recipe))
    if isinstance(data, ImageData):
        image = data.parts["train"].first()
        try:
            teacher(image.unsqueeze(0))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = f"the teacher does not take the images that train, {list(image.shape)}: {first_line(error)}"
            raise _unfit(recipe, message) from error
    return teacher


def distillation_loss(logits: Tensor, answers: Tensor, distill: Distillation, *, single: bool) -> Tensor:
    """Return how far a student's answers are from its teacher's, at a temperature that softens both (arXiv:1503.02531).

    Args:
        logits: of the student [b x k].
        answers: logits of the teacher [b x k].
        distill: the recipe's temperature T; the loss is multiplied by T², so that its gradients keep their size.
        single: whether each class is a question of its own, as with `bce` and `focal`; else one among all.
    """
    softened, answered = logits.float() / distill.temperature, answers.float() / distill.temperature
    if single:
        loss = functional.binary_cross_entropy_with_logits(softened, answered.sigmoid())
    else:
        loss = functional.kl_div(
            softened.log_softmax(dim=1), answered.log_softmax(dim=1), reduction="batchmean", log_target=True
        )
    return loss * distill.temperature**2


def _normalisation(steps: Preprocessing | None) -> Tensor:  # [2 x c x 1 x 1]
    mean, std = (steps.mean, steps.std) if steps is not None else (None, None)
    return torch.tensor([mean or (0.0,), std or (1.0,)])[..., None, None]


def _unfit(recipe: Recipe, message: str) -> RecipeError:
    return RecipeError(recipe.document.problem("train.distill.teacher", message))
