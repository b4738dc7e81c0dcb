"""The module of `kw-fit`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kw_lightning.fit import fit
from kw_lightning.fit.module import advice_on_graphs
from kw_lightning.recipe.types import Train

GPU = torch.device("cuda", 0)


def test_a_gpu_is_advised_to_record_its_steps() -> None:
    advice = advice_on_graphs(Train(), GPU)
    assert advice is not None
    for setting in ("train.compile=reduce-overhead", "train.precision=bf16-mixed", "train.channels_last=true"):
        assert setting in advice


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        (Train(), torch.device("cpu")),
        (Train(compile="reduce-overhead"), GPU),
        (Train(compile=True), GPU),
        (Train(accumulate=2), GPU),
    ],
)
def test_nothing_is_advised_that_is_impossible_or_was_decided(settings: Train, device: torch.device) -> None:
    assert advice_on_graphs(settings, device) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("recipe", "advised"), [("digits-resnet", True), ("digits-resnet-static", False)])
def test_only_dynamic_networks_begin_with_the_advice(
    recipe: str, advised: bool, tmp_path: Path, quick: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    fit(recipe, [*quick, "train.accelerator=gpu"], output=tmp_path / "run")
    assert any("CUDA graphs" in str(warning.message) for warning in recwarn) is advised


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_train_as_their_operators_do(tmp_path: Path) -> None:
    settings = ["train.epochs=2", "temperature.epochs=1", "train.accelerator=gpu"]
    recorded = fit("digits-resnet", [*settings, "train.compile=reduce-overhead"], output=tmp_path / "recorded")
    plain = fit("digits-resnet", settings, output=tmp_path / "plain")
    assert recorded.test["accuracy"] == pytest.approx(plain.test["accuracy"], abs=0.1)
