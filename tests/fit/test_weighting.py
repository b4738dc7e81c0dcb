"""Weights of classes: by name, or so that all classes count the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.data import ImageData
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.weighting import class_weights
from kw_lightning.recipe.types import Recipe


def recipe_with(weights: Any, **data: Any) -> Recipe:
    train = {"class_weights": weights}
    return load_recipe({"kw": 1, "data": {"name": "fake", **data}, "train": train})


def test_balanced_weights_make_all_classes_count_the_same() -> None:
    recipe = recipe_with("balanced", args={"classes": 4, "train": 10, "evaluation": 1, "shape": [1, 4, 4]})
    data = ImageData(recipe)
    assert data.class_counts == [3, 3, 2, 2]
    weights = class_weights(recipe, data)
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / 12, 10 / 12, 10 / 8, 10 / 8])
    assert (weights * torch.tensor(data.class_counts)).tolist() == pytest.approx([2.5] * 4)
    assert class_weights(recipe_with("none"), data) is None


def test_weights_by_name_leave_the_other_classes_at_one() -> None:
    data: Any = SimpleNamespace(classes=("cat", "dog", "eel"))
    assert class_weights(recipe_with({"dog": 3, "eel": 0.5}), data).tolist() == [1, 3, 0.5]  # type: ignore[union-attr]
    numbered: Any = SimpleNamespace(classes=(), num_classes=3)
    assert class_weights(recipe_with({"2": 4}), numbered).tolist() == [1, 1, 4]  # type: ignore[union-attr]


def test_what_cannot_be_weighed_is_told_with_its_place() -> None:
    data: Any = SimpleNamespace(classes=[f"class{number}" for number in range(100)] + ["dog"])
    with pytest.raises(RecipeError) as caught:
        class_weights(recipe_with({"dgo": 3, "zebra": 1, "dog": 2}), data)
    first, second = caught.value.problems
    assert first.path == "train.class_weights.dgo"
    assert first.message.startswith('found the unknown class "dgo", allowed: class0, class1, ')
    assert first.message.endswith('class19 and 81 more; did you mean "dog"?')
    assert second.path == "train.class_weights.zebra"
    for weights, attribute in (("balanced", "class_counts"), ({"dog": 2}, "classes")):
        with pytest.raises(
            RecipeError, match=f"^train.class_weights: this takes the attribute {attribute} of the data"
        ):
            class_weights(recipe_with(weights), SimpleNamespace())  # type: ignore[arg-type]
    for wrong in (0, {"dog": 0}, {}, {"dog": "much"}):
        with pytest.raises(RecipeError, match=r"train\.class_weights"):
            recipe_with(wrong)


def test_a_run_weighs_its_classes_and_evaluates_without_weights(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*quick, "log.tensorboard=false", "train.epochs=1", "train.class_weights.3=5", "train.ema.decay=0.9"]
    with pytest.raises(RecipeError, match=r'train\.class_weights\.10: found the unknown class "10", allowed: 0, 1, 2'):
        fit("digits-resnet", [*options, "train.class_weights.10=2"], output=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    seen: list[tuple[float, float]] = []
    original = Classifier.training_step

    def step(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        logits: list[torch.Tensor] = []
        with self.network.register_forward_hook(lambda module, inputs, output: logits.append(output)):
            loss = original(self, batch, index)
        weights = torch.tensor([1.0, 1, 1, 5, 1, 1, 1, 1, 1, 1])
        seen.append((loss.item(), functional.cross_entropy(logits[0], batch[1], weights).item()))
        return loss

    monkeypatch.setattr(Classifier, "training_step", step)
    done = fit("digits-resnet", options, output=tmp_path / "run")
    assert [found for found, _ in seen] == pytest.approx([expected for _, expected in seen])
    assert len(seen) == 3
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert "class_weights" not in state["state_dict"]  # they follow from the data
    assert done.last["loss"] > 0
