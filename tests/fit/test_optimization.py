"""Optimizers and schedules of a recipe."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit.optimization import make_optimizer, make_schedule
from kw_lightning.recipe.types import Recipe


def recipe_with(**train: Any) -> Recipe:
    return load_recipe({"kw": 1, "model": {"backbone": "torchvision/resnet18"}, "train": train})


def rates(recipe: Recipe, steps: int, per_epoch: int) -> list[float]:
    optimizer = make_optimizer(recipe, [nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(recipe, optimizer, steps, per_epoch)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_optimizer_gets_its_arguments() -> None:
    recipe = recipe_with(optimizer={"name": "SGD", "lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": True})
    optimizer = make_optimizer(recipe, [nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.1, 0.01, 0.9, True)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"name": "AdamV"},
            r'^train\.optimizer\.name: found the unknown optimizer "AdamV", allowed: .*, AdamW, .*; did you '
            r'mean "Adam"\?$',
        ),
        (
            {"name": "Optimizer"},
            r'^train\.optimizer\.name: found the unknown optimizer "Optimizer", allowed: .*, SparseAdam$',
        ),
        (
            {"name": "AdamW", "args": {"betaz": 1}},
            r'^train\.optimizer\.betaz: found the unknown argument "betaz", allowed: lr, .*, fused; did you '
            r'mean "betas"\?$',
        ),
        ({"name": "SGD", "nesterov": True}, r"train\.optimizer: SGD: Nesterov momentum requires a momentum"),
    ],
)
def test_mistakes_are_placed(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_optimizer(recipe_with(optimizer=optimizer), [nn.Parameter(torch.zeros(1))])


def test_warm_up_then_cosine() -> None:
    recipe = recipe_with(optimizer={"lr": 1.0}, schedule={"name": "cosine", "warmup_epochs": 2, "final_lr": 0.1})
    found = rates(recipe, steps=100, per_epoch=10)
    assert found[:3] == pytest.approx([0, 0.05, 0.1])  # from 0, step by step
    assert found[10] == pytest.approx(0.5, abs=0.01)
    assert found[20] == pytest.approx(1.0)
    for step in (30, 60, 99):
        assert found[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80)))


def test_linear_ends_at_the_final_rate() -> None:
    found = rates(recipe_with(optimizer={"lr": 1.0}, schedule={"name": "linear", "final_lr": 0.5}), 10, 10)
    assert found == pytest.approx([1 - 0.05 * step for step in range(10)])


def test_step_counts_epochs() -> None:
    schedule = {"name": "step", "args": {"step_size": 2, "gamma": 0.1}}
    found = rates(recipe_with(optimizer={"lr": 1.0}, schedule=schedule), steps=15, per_epoch=3)
    assert found == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 3)


def test_a_constant_schedule_keeps_the_learning_rate() -> None:
    assert set(rates(recipe_with(optimizer={"lr": 0.5}, schedule={"name": "constant"}), 5, 5)) == {0.5}


def test_unknown_argument_of_the_schedule() -> None:
    with pytest.raises(RecipeError, match=r"train\.schedule\.args: step: .*gama"):
        rates(recipe_with(schedule={"name": "step", "args": {"gama": 0.1}}), 5, 5)
