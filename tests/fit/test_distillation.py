"""A trained network as teacher: its answers are part of the loss, and it is no part of the student."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quick_run import QUICK
from torch import nn
from torch.nn import functional

from kw_lightning import load, load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit import Result, fit
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.distillation import Teacher, distillation_loss, find_teacher
from kw_lightning.fit.module import Classifier
from kw_lightning.inference import ImageClassifier
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.recipe.types import Distillation, Recipe

OPTIONS = [*QUICK, "log.tensorboard=false", "train.epochs=1", "train.accelerator=cpu"]


@pytest.fixture(scope="module")
def teaching(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return fit("digits-resnet-static", OPTIONS, output=tmp_path_factory.mktemp("runs") / "teacher")


def recipe_with(teacher: Path, **data: Any) -> Recipe:
    return load_recipe({"kw": 1, "data": {"name": "digits"} | data, "train": {"distill": {"teacher": str(teacher)}}})


def test_answers_are_compared_at_their_temperature() -> None:
    logits, answers = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, 0.0, -1.0]])
    distill = Distillation("x", temperature=4)

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(value / 4) for value in row)
        return [math.exp(value / 4) / total for value in row]

    said, taught = softmax(logits[0].tolist()), softmax(answers[0].tolist())
    expected = 16 * sum(t * math.log(t / s) for s, t in zip(said, taught, strict=True))
    assert distillation_loss(logits, answers, distill, single=False).item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(answers, answers, distill, single=False).item() == pytest.approx(0, abs=1e-6)
    single = distillation_loss(logits, answers, distill, single=True)
    by_torch = 16 * functional.binary_cross_entropy((logits / 4).sigmoid(), (answers / 4).sigmoid())
    assert single.item() == pytest.approx(by_torch.item(), rel=1e-5)


def test_a_teacher_sees_images_in_its_own_mean_and_std_and_answers_in_the_students_order() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4))
    own, shown = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), Preprocessing((0.1, 0.1, 0.2), (0.5, 0.6, 0.7))
    pixels = torch.rand(5, 3, 2, 2)

    def normalised(steps: Preprocessing) -> torch.Tensor:
        mean, std = torch.tensor([steps.mean, steps.std])[..., None, None]
        return (pixels - mean) / std

    teacher = Teacher(network, torch.tensor([3, 0]), own, shown)
    expected = network(normalised(own))[:, [3, 0]]  # in evaluation mode: a batch changes no statistics
    assert torch.allclose(teacher(normalised(shown)), expected, atol=1e-5)
    assert torch.equal(Teacher(network, None, own, own)(pixels), network(pixels))
    assert not teacher(pixels).requires_grad
    assert copy.deepcopy(teacher) is teacher
    plain = Teacher(network, None, None, Preprocessing((0.5,), (0.25,)))
    assert torch.allclose(plain((pixels - 0.5) / 0.25), network(pixels), atol=1e-5)


def test_a_run_learns_from_its_teacher_and_does_not_keep_it(
    teaching: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[tuple[float, float]] = []
    original = Classifier.training_step
    network = load(teaching.folder).network.eval()

    def step(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        logits: list[torch.Tensor] = []
        with self.network.register_forward_hook(lambda module, inputs, output: logits.append(output)):
            loss = original(self, batch, index)
        answers = network(batch[0])
        divergence = functional.kl_div((logits[0] / 3).log_softmax(1), (answers / 3).softmax(1), reduction="batchmean")
        expected = 0.3 * functional.cross_entropy(logits[0], batch[1]) + 0.7 * 9 * divergence
        taught.append((loss.item(), expected.item()))
        return loss

    monkeypatch.setattr(Classifier, "training_step", step)
    distill = f"train.distill={{teacher: {teaching.folder}, weight: 0.7, temperature: 3}}"
    done = fit("digits-resnet", [*OPTIONS, distill, "train.ema.decay=0.9"], output=tmp_path / "run")
    assert [found for found, _ in taught] == pytest.approx([expected for _, expected in taught], rel=1e-4)
    assert len(taught) >= 3
    state = torch.load(done.folder / "checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in key for key in state["state_dict"])
    assert load(done.folder).classes == load(teaching.folder).classes  # and no teacher is looked for


def test_a_teacher_that_does_not_fit_is_told_before_a_folder_is_made(teaching: Result, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"^<command line>:14:23: train\.distill\.teacher: .*nowhere: no such file or folder"
    ):
        fit("digits-resnet", [*OPTIONS, "train.distill.teacher=nowhere"], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other: Any = SimpleNamespace(classes=("9", "cat", "0"), num_classes=3)
    with pytest.raises(RecipeError, match=r"^train\.distill\.teacher: the teacher does not know the classes cat$"):
        find_teacher(recipe_with(teaching.folder), other)
    unnamed: Any = SimpleNamespace(classes=(), num_classes=7)
    with pytest.raises(RecipeError, match="the teacher has 10 classes and the data 7"):
        find_teacher(recipe_with(teaching.folder), unnamed)
    saved = load(teaching.folder).saved
    ImageClassifier(replace(saved, several=True)).save_pretrained(tmp_path / "several")
    with pytest.raises(RecipeError, match="found a teacher of several labels an image, allowed: one"):
        find_teacher(recipe_with(tmp_path / "several"), None)
    coloured = recipe_with(teaching.folder, name="fake", args={"shape": [3, 8, 8], "classes": 10, "train": 4})
    with pytest.raises(RecipeError, match=r"the teacher does not take the images that train, \[3, 8, 8\]: "):
        find_teacher(coloured, ImageData(coloured))
    some: Any = SimpleNamespace(classes=("9", "0"), num_classes=2)
    found = find_teacher(recipe_with(teaching.folder), some)
    assert found is not None
    assert found.columns is not None
    assert found.columns.tolist() == [9, 0]
