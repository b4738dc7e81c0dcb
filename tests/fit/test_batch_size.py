"""A batch as large as the memory holds: found once, locked, kept by a resume; and channels last."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kw_lightning.errors import RecipeError
from kw_lightning.fit import Classifier, Result, fit
from kw_lightning.fit.batch_size import sized, with_batch_size
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

OPTIONS = ["log.tensorboard=false", "train.schedule.name=constant", "train.epochs=1"]
FITS = 16


def small_memory(original: Any) -> Any:
    """Return a training step whose memory holds 16 images."""

    def step(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if len(batch[0]) > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        loss: torch.Tensor = original(self, batch, index)
        return loss

    return step


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result, str]:
    """Return a run that found its batch, one that was given it, and what was said."""
    from quick_run import QUICK

    folder = tmp_path_factory.mktemp("runs")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kw_lightning").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", small_memory(Classifier.training_step))
        found = fit("digits-resnet", [*QUICK, *OPTIONS, "train.batch_size=auto"], output=folder / "found")
    logging.getLogger("kw_lightning").removeHandler(handler)
    given = fit("digits-resnet", [*QUICK, *OPTIONS, f"data.batch_size={FITS}"], output=folder / "given")
    return found, given, "\n".join(said)


def weights(result: Result) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(result.folder / "checkpoints/last.ckpt", weights_only=True)
    return found["state_dict"]  # type: ignore[return-value]


def test_the_found_batch_is_locked_and_trains_as_if_it_had_been_given(runs: tuple[Result, Result, str]) -> None:
    found, given, said = runs
    lock = yaml.safe_load((found.folder / "recipe.lock.yaml").read_text())
    assert lock["data"]["batch_size"] == FITS
    assert "batch_size" not in lock["train"]
    assert "auto found 16 images a batch; train.optimizer.lr, " in said
    assert "train.accumulate, 1, stay as they are" in said
    assert all(torch.equal(value, weights(given)[key]) for key, value in weights(found).items())


def test_a_resume_keeps_what_was_found(
    runs: tuple[Result, Result, str], tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr("kw_lightning.fit.batch_size._found", refuse)
    options = [*quick, *OPTIONS, "train.epochs=2", "train.batch_size=auto"]
    folder = shutil.copytree(runs[0].folder, tmp_path / "found")  # the other test looks at it as it was
    result = fit("digits-resnet", options, resume=folder)
    assert torch.load(result.folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    assert yaml.safe_load((result.folder / "recipe.lock.yaml").read_text())["data"]["batch_size"] == FITS


def test_a_number_stands_in_the_data() -> None:
    with pytest.raises(RecipeError, match=r'train\.batch_size: found "64", allowed: auto'):
        load_recipe("digits-resnet", ["train.batch_size=64"])
    recipe = load_recipe("digits-resnet", ["train.batch_size=auto"])
    assert with_batch_size(recipe, 7).data.batch_size == 7  # type: ignore[union-attr]
    planned = plan(recipe)
    again = sized(planned, {"hyper_parameters": {"recipe": {"data": {"batch_size": 24}}}})
    assert again.warehouses == planned.warehouses
    assert again.recipe.data.batch_size == 24  # type: ignore[union-attr]


def test_channels_last_computes_the_same(tmp_path: Path, quick: list[str]) -> None:
    last = fit("digits-resnet-static", [*quick, *OPTIONS, "train.channels_last=true"], output=tmp_path / "last")
    kernels = [kernel for kernel in last.module.network.parameters() if kernel.ndim == 4 and kernel.shape[1] > 1]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    plain = fit("digits-resnet-static", [*quick, *OPTIONS], output=tmp_path / "plain")
    for key, value in weights(last).items():
        assert torch.allclose(value.double(), weights(plain)[key].double(), atol=1e-3), key
    torch.manual_seed(0)
    dynamic = Classifier(load_recipe("digits-resnet", [*quick, "train.channels_last=true"]))
    images = torch.rand(4, 1, 8, 8)
    assert torch.allclose(dynamic(images), dynamic.network(images), atol=1e-5)
