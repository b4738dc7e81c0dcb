"""Copies of the network inside the LightningModule, as momentum encoders are: dynamic with it, of its weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import Net, loader, trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kw_lightning.callbacks import KWCallback, load_from_checkpoint
from kw_lightning.callbacks.copies import copies_of
from kw_lightning.nn import KWLayer, Warehouse

RECIPE: dict[str, Any] = {
    "kw": 1,
    "name": "tiny",
    "warehouses": {"convolutions": {"layers": ["conv?"], "attention": {"norm": "layer"}}},
    "temperature": {"steps": 10},
}


class Momentum(LightningModule):
    """As BYOL: a backbone, a frozen copy of it that follows by a moving average, and a head of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net()
        self.predictor = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.other = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        online, momentum = list(self.backbone.parameters()), list(self.backbone_momentum.parameters())
        torch._foreach_mul_(momentum, 0.5)
        torch._foreach_add_(momentum, [parameter.detach() for parameter in online], alpha=0.5)
        loss = (self.predictor(self.backbone(batch[0])) - self.backbone_momentum(batch[0])).square().mean()
        return loss + self.other(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


class Validated(Momentum):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.backbone(batch[0])


def dynamic(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, KWLayer)]


BOTH = ["backbone.conv1", "backbone.conv2", "backbone_momentum.conv1", "backbone_momentum.conv2"]


def test_a_copy_becomes_dynamic_with_the_network_and_starts_from_its_weights(tmp_path: Path) -> None:
    model = Momentum()
    callback = KWCallback(RECIPE, module="backbone")
    callback.setup(trainer(tmp_path, callbacks=[callback]), model, "fit")
    assert dynamic(model) == BOTH
    assert copies_of(model, "backbone") == ("backbone_momentum",)
    own, other = model.backbone.state_dict(), model.backbone_momentum.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not {id(p) for p in model.backbone.parameters()} & {id(p) for p in model.backbone_momentum.parameters()}
    assert not any(p.requires_grad for p in model.backbone_momentum.parameters())
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_a_momentum_encoder_trains_anneals_and_is_loaded_with_its_network(tmp_path: Path) -> None:
    model = Momentum()
    before = copy.deepcopy(model.backbone.stem.weight)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE, module="backbone")])
    run.fit(model, loader())
    assert dynamic(model) == BOTH
    temperatures = [float(m.temperature) for m in model.modules() if isinstance(m, Warehouse)]
    assert temperatures == [0.5, 0.5]  # 5 of 10 steps
    first, second = model.backbone.conv1.warehouse.cells, model.backbone_momentum.conv1.warehouse.cells
    assert not torch.equal(first, second)
    assert not torch.equal(model.backbone_momentum.stem.weight, before)
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = load_from_checkpoint(Momentum, tmp_path / "run.ckpt")
    assert dynamic(loaded) == BOTH
    assert torch.equal(loaded.backbone_momentum.conv1.warehouse.cells, second)


def test_a_copy_that_stays_static_is_told(tmp_path: Path) -> None:
    outer = {**RECIPE, "warehouses": {"a": {"layers": ["backbone.conv?"], "attention": {"norm": "layer"}}}}
    run = trainer(tmp_path, callbacks=[KWCallback(outer)])
    with pytest.warns(UserWarning, match=r'"backbone" is dynamic now, and "backbone_momentum", a copy .* module="back'):
        run.validate(Validated(), loader(), verbose=False)
    both = {**RECIPE, "warehouses": {"a": {"layers": ["backbone*.conv?"], "attention": {"norm": "layer"}}}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a copy of it")
        trainer(tmp_path, callbacks=[KWCallback(both)]).validate(Validated(), loader(), verbose=False)


def test_another_fit_anneals_the_copy_too(tmp_path: Path) -> None:
    model = Momentum()
    for _ in range(2):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE, module="backbone")]).fit(model, loader())
        assert [float(m.temperature) for m in model.modules() if isinstance(m, Warehouse)] == [0.5, 0.5]


def test_a_copy_made_as_the_fit_starts_has_the_temperature(tmp_path: Path) -> None:
    class Late(Momentum):
        def on_fit_start(self) -> None:
            self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            for target, online in zip(self.backbone_momentum.parameters(), self.backbone.parameters(), strict=True):
                target.data.mul_(0.5).add_(online.data, alpha=0.5)  # .data: autograd does not count it as a change

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.backbone(batch[0]) - self.backbone_momentum(batch[0])).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.backbone.parameters(), lr=0.1)

    model = Late()
    model.backbone_momentum = nn.Identity()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE, module="backbone")])
    run.fit(model, loader())
    assert [float(m.temperature) for m in model.modules() if isinstance(m, Warehouse)] == [0.5, 0.5]
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert "copies" not in torch.load(tmp_path / "run.ckpt")["kw_lightning"][0]  # a module that is made has none yet


@pytest.mark.parametrize("change", ["weights", "meta", "shared"])
def test_what_only_looks_alike_is_no_copy(change: str) -> None:
    model = Momentum()
    if change == "weights":
        nn.init.zeros_(model.backbone_momentum.stem.bias)
    elif change == "meta":
        model.to("meta")
    else:
        model.backbone_momentum = model.backbone
    assert copies_of(model, "backbone") == ()
    assert copies_of(model, None) == ()


def test_copies_inside_the_network_and_around_it_are_none() -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": nn.Sequential(inner, copy.deepcopy(inner)), "b": copy.deepcopy(inner)})
    assert copies_of(model, "a.0") == ("a.1", "b")
    assert copies_of(model, "a") == ()
