"""Frozen layers stand still, thaw when their epochs are over, and a resumed run goes on to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kw_lightning.fit import Classifier, fit

GROUPS = ["train.optimizer.no_decay=vectors", "train.optimizer.groups=[{layers: stage2, lr: 0.5x}]"]
FROZEN = ("network.stem.", "network.stage1.")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def changed(quick: list[str], folder: Path, *options: str) -> set[str]:
    """Return the keys of the state that a run of one epoch changes; the temperature apart."""
    before = fit("digits-resnet", [*quick, "train.epochs=0"], output=folder / "before")
    after = fit(
        "digits-resnet", [*quick, "train.epochs=1", "train.freeze=[stem, stage1]", *options], output=folder / "after"
    )
    first, last = state_of(before.folder), state_of(after.folder)
    return {key for key in first if "temperature" not in key and not torch.equal(first[key], last[key])}


def test_frozen_layers_keep_weights_and_statistics(quick: list[str], tmp_path: Path) -> None:
    moved = changed([*quick, "log.tensorboard=false"], tmp_path)
    assert not [key for key in moved if key.startswith(FROZEN)]
    assert {"network.stage2.main.running_mean", "network.classifier.weight"} <= moved
    assert "network.stage2.conv1.warehouse.cells" in moved


@pytest.mark.parametrize(("epochs", "moves"), [(0, True), (1, False)])
def test_layers_thaw_when_their_epochs_are_over(epochs: int, moves: bool, quick: list[str], tmp_path: Path) -> None:
    quick = [*quick, "log.tensorboard=false", "train.optimizer.momentum=0.9", "train.optimizer.name=SGD"]
    moved = changed(quick, tmp_path, f"train.freeze_epochs={epochs}")
    expected = {"network.stage1.conv1.warehouse.cells", "network.stage1.main.running_mean", "network.stem.weight"}
    assert (moved & expected) == (expected if moves else set())


@pytest.mark.parametrize("step", [1, 4])  # while frozen, and after the thaw
def test_a_resumed_run_ends_with_the_same_bits(
    step: int, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*quick, *GROUPS, "log.tensorboard=false", "train.freeze=[stem, stage1]", "train.freeze_epochs=1"]
    unbroken = fit("digits-resnet", options, output=tmp_path / "unbroken")
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("digits-resnet", options, output=tmp_path / "broken")
    resumed = fit("digits-resnet", options, resume=tmp_path / "broken")
    expected, found = (torch.load(r.folder / "checkpoints/last.ckpt", weights_only=True) for r in (unbroken, resumed))
    assert all(torch.equal(value, found["state_dict"][key]) for key, value in expected["state_dict"].items())
    (expected_optimizer,), (optimizer,) = expected["optimizer_states"], found["optimizer_states"]
    assert optimizer["param_groups"] == expected_optimizer["param_groups"]
    assert len(optimizer["param_groups"]) == 4
    assert optimizer["state"].keys() == expected_optimizer["state"].keys()
    for index, values in expected_optimizer["state"].items():
        assert all(torch.equal(value, optimizer["state"][index][key]) for key, value in values.items())
