"""Adapters beside frozen layers: nothing changes at first, only they train, and all else of a run works with them."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kw_lightning
from kw_lightning import KWCallback
from kw_lightning.builder import build
from kw_lightning.errors import KWError, RecipeError
from kw_lightning.export.static import fold
from kw_lightning.fit import evaluate, fit
from kw_lightning.inference.loading import load
from kw_lightning.nn.adapter import Adapted, count_trainable, trainable_line
from kw_lightning.planning import plan
from kw_lightning.planning.table import total_lines
from kw_lightning.recipe import load_recipe

RESNET: dict[str, Any] = {
    "kw": 1,
    "model": {"input": [3, 32, 32]},
    "defaults": {"adapter": {"rank": 4, "train": ["fc"]}},
    "stages": "auto",
}
VIT: dict[str, Any] = {
    "kw": 1,
    "model": {"input": [3, 16, 16]},
    "warehouses": {
        "patches": {"layers": ["conv_proj"], "adapter": {"rank": 2}},
        "mlp": {"layers": ["encoder.layers.*.mlp.?"], "adapter": {"rank": 4, "train": ["*.ln_?", "heads"]}},
    },
}


def vit() -> nn.Module:
    size = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 5}
    network = torchvision.models.VisionTransformer(image_size=16, patch_size=4, **size)
    nn.init.normal_(network.heads.head.weight)  # torchvision starts it at zero, and nothing before it would learn
    return network


NETWORKS = {"resnet18": (lambda: torchvision.models.resnet18(num_classes=5), RESNET, 32), "vit": (vit, VIT, 16)}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_output_is_that_of_the_frozen_network_to_the_bit_and_only_adapters_train(name: str) -> None:
    make, recipe, side = NETWORKS[name]
    torch.manual_seed(0)
    static = make()
    for key, buffer in static.named_buffers():  # statistics of a network that was trained
        if key.endswith("running_var"):
            buffer.uniform_(0.3, 0.6)
    network = copy.deepcopy(static)
    planned = plan(load_recipe(recipe), network)
    assert kw_lightning.convert(network, recipe) is network
    assert planned.trainable == count_trainable(network)[0]
    assert planned.parameters.kw == count_trainable(network)[1]
    x = torch.randn(3, 3, side, side)
    static.requires_grad_(False)
    with torch.no_grad():  # torch's self-attention takes another path where there are gradients
        assert torch.equal(network.eval()(x), static.eval()(x))
        in_training = static.train(name == "vit")  # of the residual network the running statistics stand still
        assert torch.equal(network.train()(x), in_training(x))
    static.eval()

    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):  # a lower half has a gradient once its upper one is not zero
        network.train()
        F.cross_entropy(network(x), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    own = ("down.", "up.", "fc.", "heads.", ".ln_1.", ".ln_2.")
    assert all(any(part in key for part in own) for key in changed), changed
    cells = [key for key in before if key.endswith("warehouse.cells")]
    assert cells
    assert [key for key in cells if key not in changed] == []
    assert not torch.equal(network.eval()(x), static(x))

    twin = kw_lightning.convert(make(), recipe)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_a_network_with_adapters_is_exported_for_any_batch() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 5)).eval()
    layers = {f"w{name}": {"layers": [name], "adapter": {"rank": 2}} for name in "02"}
    kw_lightning.convert(network, {"kw": 1, "warehouses": layers})
    for key, parameter in network.named_parameters():
        if key.endswith("cells"):
            nn.init.normal_(parameter)
    x = torch.randn(3, 3, 8, 8)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(x[:2]), network(x[:2]), atol=1e-4, rtol=1e-4)


def test_hooks_and_a_single_layer() -> None:
    layer, seen = nn.Linear(6, 4), list[Tensor]()
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    recipe = {"kw": 1, "warehouses": {"all": {"layers": ["*"], "adapter": {"rank": 2}}}}
    adapted = kw_lightning.convert(layer, recipe)
    assert isinstance(adapted, Adapted)
    assert adapted.frozen is layer
    nn.init.ones_(adapted.up.warehouse.cells)
    y = adapted(torch.randn(3, 6))
    assert len(seen) == 1
    assert torch.equal(seen[0], y)
    with pytest.raises(KWError, match="is dynamic already"):
        kw_lightning.convert(nn.Sequential(adapted), recipe)


def test_convolutions_of_every_geometry_have_adapters() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.Conv2d(8, 4, (1, 3), dilation=2),
    ).eval()
    recipe = {"kw": 1, "warehouses": {f"w{i}": {"layers": [str(i)], "adapter": {"rank": 2}} for i in range(3)}}
    x = torch.randn(2, 4, 12, 12)
    expected = network(x)
    assert torch.equal(kw_lightning.convert(network, recipe)(x), expected)
    for layer in network:
        nn.init.ones_(layer.up.warehouse.cells)
    assert network(x).shape == expected.shape
    assert not torch.equal(network(x), expected)


def test_the_plan_counts_as_peft_does_and_leaves_the_frozen_network_out_of_the_cells() -> None:
    planned = plan(load_recipe(RESNET), torchvision.models.resnet18(num_classes=5))
    assert [warehouse.name for warehouse in planned.warehouses][:2] == ["stage1-down", "stage1-up"]
    first, second = planned.warehouses[:2]
    assert first.partition.cell_shape == (4, 64, 1, 1)
    assert second.partition.cell_shape == (64, 4, 1, 1)
    assert first.layers[0].name == "layer1.0.conv1.down"
    assert first.layers[0].macs is not None
    assert (first.layers[0].macs.static, first.layers[0].macs.kw > 0) == (0, True)
    assert planned.macs is not None
    assert planned.macs.kw == planned.macs.static + sum(
        layer.macs.kw for warehouse in planned.warehouses for layer in warehouse.layers if layer.macs
    )
    sizes = sum(warehouse.cell_parameters + warehouse.attention_parameters for warehouse in planned.warehouses)
    assert planned.trainable == sizes + 5 * 512 + 5
    line = trainable_line(planned.trainable, planned.parameters.kw)
    assert line in " ".join(total_lines(planned))
    assert trainable_line(1234, 100_000) == "trainable params: 1,234 || all params: 100,000 || trainable%: 1.2340"
    assert planned.to_dict()["trainable"] == planned.trainable


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"adapter": {"rank": 4, "train": ["fx"]}},
            r'warehouses\.a\.adapter\.train\[0\]: found "fx".*did you mean "fc"',
        ),
        ({"adapter": {"rank": 4}, "budget": {"cells": 4}}, r"warehouses\.a\.budget: found a budget in cells"),
        ({"adapter": {"rank": 4}, "layers": ["fc[0:1/5]"]}, r'adapter: found a slice, "fc\[0:1\]"'),
        ({"adapter": {"rank": 0}}, r"warehouses\.a\.adapter\.rank: found 0, allowed"),
        ({"adapter": {"ranks": 4}}, r'unknown key "ranks".*did you mean "rank"'),
    ],
)
def test_mistakes_are_told_with_their_place(changed: dict[str, Any], said: str) -> None:
    recipe = {"kw": 1, "warehouses": {"a": {"layers": ["fc"], **changed}}}
    with pytest.raises(RecipeError, match=said):
        plan(load_recipe(recipe), torchvision.models.resnet18(num_classes=5))


def test_none_switches_the_adapter_of_the_defaults_off() -> None:
    entries: dict[str, Any] = {"a": {"layers": ["x"], "adapter": "none"}, "c": {"layers": ["z"]}}
    entries["b"] = {"layers": ["y"], "adapter": {"train": ["z"]}}
    found = load_recipe({"kw": 1, "defaults": {"adapter": {"rank": 3}}, "warehouses": entries})
    adapters = [warehouse.adapter for warehouse in found.warehouses]
    assert adapters[0] is None
    assert [(one.rank, one.train) for one in adapters[1:] if one] == [(3, ()), (3, ("z",))]
    empty = load_recipe({"kw": 1, "warehouses": {"a": {"layers": ["x"], "adapter": {}}}}).warehouses[0]
    assert empty.adapter is not None
    assert (empty.adapter.rank, empty.names) == (16, ("a-down", "a-up"))


class Module(LightningModule):
    """A LightningModule as a user has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def trainer_of(folder: Path, callback: KWCallback) -> Trainer:
    return Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_kw_callback_trains_adapters_alone_and_its_checkpoint_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warehouses = {name: {"layers": [layer], "adapter": {"rank": 2}} for name, layer in (("a", "net.0"), ("b", "net.4"))}
    recipe = {"kw": 1, "warehouses": warehouses}
    module = Module()
    frozen = {key: value.clone() for key, value in module.state_dict().items()}
    data = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 4), batch_size=4)
    trainer = trainer_of(tmp_path, KWCallback(recipe))
    with caplog.at_level(logging.INFO, logger="kw_lightning"):
        trainer.fit(module, data)
    assert trainable_line(*count_trainable(module)) in caplog.text
    now = {key.replace(".frozen.", "."): value for key, value in module.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in frozen.items())  # statistics, and what decay would shrink
    assert all(cells.any() for name, cells in now.items() if name.endswith("warehouse.cells"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = Module()
    again = trainer_of(tmp_path, KWCallback(recipe))
    again.fit_loop.max_epochs = 2
    again.fit(other, data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(now["net.1.running_mean"], other.net[1].running_mean)
    assert not torch.equal(module.eval().net(x), other.eval().net(x))  # it went on


QUICK = ["vars.stem=16", "vars.first=16", "vars.second=16", "data.train.samples=60", "data.eval.samples=40"]
QUICK += ["data.batch_size=20", "temperature.epochs=1", "log.tensorboard=false"]
ADAPTER = ["defaults.adapter={rank: 8, train: [classifier]}", "warehouses.*.attention.at_most=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a static network, and `adapted`, which started from it."""
    folder = tmp_path_factory.mktemp("adapters")
    fit("digits-resnet-static", [*QUICK[:6], "train.epochs=1", "log.tensorboard=false"], output=folder / "static")
    pretrained = f"model.pretrained={folder / 'static/model/model.safetensors'}"
    fit("digits-resnet", [*QUICK, *ADAPTER, pretrained, "train.epochs=2"], output=folder / "adapted")
    return folder


def test_a_run_keeps_the_frozen_network_and_can_be_measured_loaded_and_resumed(runs: Path) -> None:
    static, adapted = load(runs / "static"), load(runs / "adapted")
    before = static.network.state_dict()
    after = {key.replace(".frozen.", "."): value for key, value in adapted.network.state_dict().items()}
    stays = [key for key in before if not key.startswith("classifier")]
    assert all(torch.equal(before[key], after[key]) for key in stays)
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    result = json.loads((runs / "adapted/result.json").read_text())
    assert (result["trainable"], result["parameters"]) == count_trainable(build(adapted.saved.recipe, pretrained=False))
    found = evaluate(runs / "adapted")
    assert found.metrics["accuracy"] == result["test"]["best"]["accuracy"]
    longer = fit(runs / "adapted/recipe.lock.yaml", ["train.epochs=3"], resume=runs / "adapted", output=runs / "longer")
    assert "accuracy" in longer.test


def test_at_its_mean_attention_an_adapter_is_merged_into_the_static_network(runs: Path) -> None:
    saved = load(runs / "adapted").saved
    x = torch.randn(40, 1, 8, 8)
    folded = fold(saved, [x])
    static = load(runs / "static").network
    assert {key: value.shape for key, value in folded.network.state_dict().items()} == {
        key: value.shape for key, value in static.state_dict().items()
    }
    gap = (folded.network(x) - saved.network(x)).abs().max()
    change = (static(x) - saved.network(x)).abs().max()
    assert gap < 0.2 * change
    grouped = kw_lightning.convert(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)),
        {"kw": 1, "warehouses": {"a": {"layers": ["0"], "adapter": {"rank": 2}}}},
    )
    with pytest.raises(KWError, match='"0" has groups'):
        fold(replace(saved, network=grouped), [torch.randn(2, 4, 8, 8)])
