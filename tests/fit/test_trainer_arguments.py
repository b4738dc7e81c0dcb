"""The section `trainer`: what goes to Lightning's Trainer, and what is refused with the key that means it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from kw_lightning.errors import RecipeError
from kw_lightning.fit import Result, fit
from kw_lightning.fit.changes import APPLIED, FREE
from kw_lightning.fit.trainer import plain_trainer
from kw_lightning.fit.trainer_arguments import DECIDED, KEYS, OBJECTS, trainer_arguments
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.schema import at
from kw_lightning.recipe.types import Recipe


def recipe(**arguments: object) -> Recipe:
    return load_recipe({"kw": 1, "extends": "digits-resnet", "trainer": arguments})


def test_arguments_reach_the_trainer() -> None:
    trainer = plain_trainer(recipe(limit_val_batches=2, check_val_every_n_epoch=3, detect_anomaly=True), logger=False)
    assert (trainer.limit_val_batches, trainer.check_val_every_n_epoch) == (2, 3)
    assert plain_trainer(load_recipe("digits-resnet"), logger=False).check_val_every_n_epoch == 1


def test_every_mistake_is_told_with_the_key_or_name_that_is_meant() -> None:
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(recipe(max_epochs=3, plugins=[], limit_val_batch=1, fast_dev_run=True, accelerater="cpu"))
    told = [str(problem) for problem in caught.value.problems]
    assert 'trainer.max_epochs: "max_epochs" is the key train.epochs of a recipe: write it there' in told[0]
    assert '"plugins" takes Python objects' in told[1]
    assert 'found the unknown argument of the Trainer "limit_val_batch", allowed: ' in told[2]
    assert 'did you mean "limit_val_batches"?' in told[2]
    assert '"fast_dev_run" is decided by kw-fit' in told[3]
    assert 'did you mean "accelerator"?' in told[4]


def test_every_key_that_is_named_instead_is_one_of_the_language() -> None:
    assert all(at(path.split(".")) is not None for path in KEYS.values())
    known = set(inspect.signature(Trainer).parameters)
    assert known >= {*KEYS, *OBJECTS, *DECIDED}
    ours = {path.removeprefix("trainer.") for path in (*APPLIED, *FREE) if path.startswith("trainer.")}
    assert ours <= known - {*KEYS, *OBJECTS, *DECIDED}


def test_a_value_that_lightning_refuses_is_one_message() -> None:
    with pytest.raises(RecipeError, match=r"Lightning refuses these settings .*limit_val_batches=-3"):
        plain_trainer(recipe(limit_val_batches=-3), logger=False)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Result]:
    from quick_run import QUICK

    options = [*QUICK, "log.tensorboard=false", "trainer.limit_train_batches=2", "train.schedule.name=constant"]
    return options, fit("digits-resnet", options, output=tmp_path_factory.mktemp("runs") / "unbroken")


def test_a_shorter_epoch_goes_on_to_the_bits(limited: tuple[list[str], Result], tmp_path: Path) -> None:
    options, unbroken = limited
    fit("digits-resnet", [*options, "train.epochs=1"], output=tmp_path / "run")
    fit("digits-resnet", options, resume=tmp_path / "run")
    folders = (tmp_path / "run", unbroken.folder)
    found, expected = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders)
    assert found["global_step"] == expected["global_step"] == 4
    assert all(torch.equal(value, expected["state_dict"][key]) for key, value in found["state_dict"].items())
