"""The losses of a recipe: torch's and torchvision's, by their formulas, with shares of classes too."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.losses import measured_loss, training_loss
from kw_lightning.recipe.types import Loss, Train


def train_with(**train: Any) -> Train:
    recipe = load_recipe({"kw": 1, "train": train})
    assert recipe.train is not None
    return recipe.train


def logits_and_classes() -> tuple[Tensor, Tensor]:
    return torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], dtype=torch.float64), torch.tensor([2, 1])


def by_hand(answer: Any, smoothing: float = 0.0) -> list[list[float]]:
    """Return, of each image and class, a function of the probability of yes and the share of the class."""
    logits, classes = logits_and_classes()
    return [
        [
            answer(1 / (1 + math.exp(-logit)), (1 - smoothing) * (number == target) + smoothing / len(row))
            for number, logit in enumerate(row)
        ]
        for row, target in zip(logits.tolist(), classes.tolist(), strict=True)
    ]


def binary(p: float, share: float) -> float:
    return -share * math.log(p) - (1 - share) * math.log(1 - p)


def focal(p: float, share: float, gamma: float = 2, alpha: float | None = 0.25) -> float:
    right = p * share + (1 - p) * (1 - share)
    weight = 1 if alpha is None else alpha * share + (1 - alpha) * (1 - share)
    return weight * (1 - right) ** gamma * binary(p, share)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss", "answer"),
    [
        ("bce", binary),
        ("focal", focal),
        ({"focal": {"gamma": 3, "alpha": 0.5}}, lambda p, share: focal(p, share, 3, 0.5)),
        ({"focal": {"gamma": 1, "alpha": "none"}}, lambda p, share: focal(p, share, 1, None)),
    ],
)
def test_losses_of_single_answers_are_their_formulas(loss: Any, answer: Any, smoothing: float) -> None:
    logits, classes = logits_and_classes()
    train = train_with(loss=loss, label_smoothing=smoothing)
    expected = torch.tensor(by_hand(answer, smoothing), dtype=torch.float64)
    assert training_loss(logits, classes, train).item() == pytest.approx(expected.mean().item(), rel=1e-6)
    unsmoothed = torch.tensor(by_hand(answer), dtype=torch.float64).mean(dim=1)
    assert measured_loss(logits, classes, train.loss).tolist() == pytest.approx(unsmoothed.tolist(), rel=1e-6)


def test_cross_entropy_is_torchs_and_the_default() -> None:
    logits, classes = logits_and_classes()
    assert Train().loss == train_with(loss="cross_entropy").loss == Loss()
    expected = functional.cross_entropy(logits, classes, label_smoothing=0.2)
    assert torch.equal(training_loss(logits, classes, train_with(label_smoothing=0.2)), expected)
    assert measured_loss(logits, classes, Loss()).mean() == functional.cross_entropy(logits, classes)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "focal"])
def test_shares_that_are_whole_give_what_classes_give(loss: str) -> None:
    logits, classes = logits_and_classes()
    train = train_with(loss=loss, label_smoothing=0.1)
    shares = functional.one_hot(classes, 3).double()
    assert torch.allclose(training_loss(logits, shares, train), training_loss(logits, classes, train))
    mixed = training_loss(logits, 0.5 * shares + 0.5 * shares.flip(0), train)
    assert mixed > training_loss(logits, shares, train)  # the network is of one mind, the images are not


def test_smoothing_of_several_labels_goes_towards_one_half() -> None:
    logits, _ = logits_and_classes()
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    found = training_loss(logits, targets, train_with(loss="bce", label_smoothing=0.2), several=True)
    expected = functional.binary_cross_entropy_with_logits(logits, 0.8 * targets.double() + 0.1)
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("loss", "answer"), [("bce", binary), ("focal", focal)])
def test_the_weight_of_a_class_is_that_of_its_yes(loss: str, answer: Any) -> None:
    logits, classes = logits_and_classes()
    weights = torch.tensor([3.0, 0.5, 2.0])
    answers = torch.tensor(by_hand(answer), dtype=torch.float64)
    answers[0, 2] *= 2  # the first image is of the third class, the second of the second
    answers[1, 1] *= 0.5
    found = training_loss(logits, classes, train_with(loss=loss), weights)
    assert found.item() == pytest.approx(answers.mean().item(), rel=1e-6)


def test_weighted_cross_entropy_is_torchs() -> None:
    logits, classes = logits_and_classes()
    weights = torch.tensor([3.0, 0.5, 2.0])
    first, second = functional.cross_entropy(logits, classes, reduction="none").tolist()
    found = training_loss(logits, classes, train_with(), weights)
    assert found.item() == pytest.approx((2 * first + 0.5 * second) / 2.5)
    shares = functional.one_hot(classes, 3).float()
    assert training_loss(logits, shares, train_with(), weights).item() == pytest.approx((2 * first + 0.5 * second) / 2)


def test_focal_loss_of_half_precision_is_computed_in_single() -> None:
    logits, classes = logits_and_classes()
    found = training_loss(logits.bfloat16(), classes, train_with(loss="focal"))
    assert found.dtype == torch.float32
    assert torch.equal(found, training_loss(logits.bfloat16().float(), classes, train_with(loss="focal")))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("foca", r'^train\.loss: found "foca", allowed: cross_entropy, bce, focal or .*; did you mean "focal"\?$'),
        ({"focal": {"gamma": 0.5}}, r"^train\.loss\.focal\.gamma: found 0\.5, allowed: a number of at least 1"),
        ({"focal": {"beta": 1}}, r'train\.loss\.focal\.beta: found the unknown key "beta", allowed: gamma, alpha'),
        ({"bce": {}}, r'train\.loss\.bce: found the unknown key "bce", allowed: focal'),
        ({}, r'train\.loss: the key "focal" is missing'),
    ],
)
def test_mistakes_in_a_loss_are_placed(loss: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train_with(loss=loss)


def test_a_run_trains_with_its_loss_and_a_resume_may_change_it(tmp_path: Path, quick: list[str]) -> None:
    options = [*quick, "log.tensorboard=false", "train.mixup=0.5", "train.label_smoothing=0.1"]
    first = fit("digits-resnet", [*options, "train.loss.focal.gamma=1", "train.epochs=1"], output=tmp_path / "run")
    assert 0 < first.last["loss"] < 0.6  # cross entropy of ten classes begins at 2.3
    second = fit("digits-resnet", [*options, "train.loss=cross_entropy"], resume=tmp_path / "run")
    assert second.last["loss"] > 1
