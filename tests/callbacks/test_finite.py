"""The first loss that is not a number ends a run, names its layer, and never reaches a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import Classifier, Net, dataset, trainer
from torch import nn
from torch.utils.data import DataLoader

from kw_lightning.callbacks import ExactCheckpoint, FiniteLoss, NonFiniteError
from kw_lightning.fit.report import json_text


class Failing(nn.Module):
    """Divides by zero in one forward pass."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return x / 0 if self.calls >= self.call else x


class Exploding(Classifier):
    """Takes a step of infinite length."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2:
            next(self.net.conv1.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]


def fitted(folder: Path, model: Any, **options: Any) -> None:
    callbacks = [FiniteLoss(**options), ExactCheckpoint(folder / "last.ckpt", steps=1)]
    trainer(folder, max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(
        model, DataLoader(dataset(40), batch_size=8)
    )


def test_the_layer_whose_activations_failed_first_is_named(tmp_path: Path) -> None:
    net = Net()
    net.head = nn.Sequential(Failing(3), nn.BatchNorm1d(16), net.head)  # its statistics fail in the same batch
    message = r'the loss is nan in step 3 \(epoch 1\): the activations failed first in layer "net\.head\.0" \(Failing\)'
    with pytest.raises(NonFiniteError, match=message + r"\. The learning rate is .*; lower"):
        fitted(tmp_path, Classifier(net))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_weights_that_fail_are_named_and_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r'after step 3 \(epoch 1\) the weights "net\.conv1\.\S+" are infinite'):
        fitted(tmp_path, Exploding(Net()))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(value.isfinite().all() for value in state["state_dict"].values() if value.is_floating_point())


def test_a_warning_is_given_once_and_training_goes_on(tmp_path: Path) -> None:
    net = Net()
    norm = nn.BatchNorm1d(16)  # computing the batch again changes its statistics, which the backward pass needs
    net.head = nn.Sequential(norm, Failing(3), net.head)
    with pytest.warns(UserWarning, match="the loss is nan in step 3") as caught:
        fitted(tmp_path, Classifier(net), on_nan="warn")
    assert len([warning for warning in caught if "the loss is" in str(warning.message)]) == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    assert norm.num_batches_tracked == 5
    with pytest.raises(ValueError, match='"stop" or "warn": found "ignore"'):
        FiniteLoss("ignore")  # type: ignore[arg-type]


class Manual(Classifier):
    """Steps by itself, as a GAN does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Twice(Classifier):
    """Does not compute a batch that it has seen."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == getattr(self, "seen", None):
            raise LookupError("seen")
        self.seen = batch_idx
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)


def test_a_layer_that_cannot_be_found_is_told_so(tmp_path: Path) -> None:
    net = Net()
    net.head = nn.Sequential(Failing(3), net.head)
    with pytest.raises(NonFiniteError, match=r"step 3 .*: with manual optimization the layer .* is not looked for"):
        fitted(tmp_path, Manual(net))
    with pytest.raises(NonFiniteError, match=r"the batch again, to find the layer, ended in LookupError: seen\."):
        fitted(tmp_path, Twice(Net()))


def test_json_holds_null(tmp_path: Path) -> None:
    text = json_text({"last": {"loss": float("nan"), "accuracy": 0.5}, "rows": [float("inf"), 1]})
    assert json.loads(text, parse_constant=pytest.fail) == {"last": {"loss": None, "accuracy": 0.5}, "rows": [None, 1]}
