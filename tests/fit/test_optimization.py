"""Optimizers and schedules of a recipe."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit.optimization import make_optimizer, make_schedule, warn_of_a_short_run
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
    ("train", "fused"),
    [
        ({"optimizer": {"name": "AdamW"}}, True),
        ({"optimizer": {"name": "SGD", "lr": 0.1}, "precision": "bf16-true"}, True),
        ({"optimizer": {"name": "Adam"}, "precision": "bf16-mixed"}, True),
        ({"optimizer": {"name": "AdamW", "args": {"fused": False}}}, False),
        ({"optimizer": {"name": "AdamW", "args": {"foreach": True}}}, None),
        ({"optimizer": {"name": "AdamW"}, "precision": "bf16-mixed", "gradient_clip": 1.0}, None),
        ({"optimizer": {"name": "AdamW"}, "precision": "16-mixed"}, None),
    ],
)
def test_one_kernel_steps_all_parameters_where_lightning_can_clip_their_gradients(
    train: dict[str, Any], fused: bool | None
) -> None:
    optimizer = make_optimizer(recipe_with(**train), [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert optimizer.defaults["fused"] is fused


def test_a_kernel_that_is_asked_for_where_gradients_cannot_be_clipped_is_refused() -> None:
    optimizer = {"name": "AdamW", "args": {"fused": True}}
    recipe = recipe_with(optimizer=optimizer, precision="bf16-mixed", gradient_clip=1.0)
    with pytest.raises(
        RecipeError, match=r"train\.optimizer\.args\.fused: found true with train\.gradient_clip in bf16-"
    ):
        make_optimizer(recipe, [nn.Parameter(torch.zeros(1))])


def test_optimizers_without_such_a_kernel_step_as_they_do() -> None:
    assert (
        "fused"
        not in make_optimizer(recipe_with(optimizer={"name": "RMSprop"}), [nn.Parameter(torch.zeros(1))]).defaults
    )
    complex_numbers = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    assert make_optimizer(recipe_with(optimizer={"name": "AdamW"}), [complex_numbers]).defaults["fused"] is None


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
            r'^train\.optimizer\.args\.betaz: found the unknown argument "betaz", allowed: lr, .*, fused; did you '
            r'mean "betas"\?$',
        ),
        ({"name": "SGD", "nesterov": True}, r"train\.optimizer: SGD: Nesterov momentum requires a momentum"),
        (
            {"name": "AdamW", "args": {"fused": True, "foreach": True}},
            r"train\.optimizer: AdamW: .*cannot be `True` tog",
        ),
    ],
)
def test_mistakes_are_placed(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_optimizer(recipe_with(optimizer=optimizer), [nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"args": {"gamma": 1}}, r'^train\.schedule\.args\.gamma: found the unknown argument "gamma", allowed: none$'),
        ({"name": "step", "args": {"gama": 1}}, r'"gama", allowed: step_size, gamma; did you mean "gamma"\?$'),
        ({"name": "step", "args": {"gamma": "a"}}, r'^train\.schedule\.args\.gamma: found "a", allowed: a number$'),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_placed(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rates(recipe_with(schedule=schedule), 10, 10)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"epochs": 2, "schedule": {"warmup_epochs": 2}, "ema": {"start_epoch": 1}}, []),
        (
            {"epochs": 2, "schedule": {"warmup_epochs": 2.5}},
            ["train.schedule.warmup_epochs: the learning rate is still rising when the run ends, after 2 epochs"],
        ),
        (
            {"epochs": 1, "ema": {"start_epoch": 1}},
            ["train.ema.start_epoch: nothing is averaged when the run ends, after 1 epoch"],
        ),
    ],
)
def test_what_the_run_is_too_short_for_is_told(
    train: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_a_short_run(recipe_with(**train))
    assert [record.message for record in caplog.records] == told


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
