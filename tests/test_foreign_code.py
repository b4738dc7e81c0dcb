"""Real packages that read weights, fuse layers or copy networks; each is skipped where it is not installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from kw_lightning.builder import convert
from kw_lightning.callbacks import KWCallback
from kw_lightning.nn import KWLayer, set_temperature


def dynamic(network: nn.Module) -> int:
    return sum(isinstance(module, KWLayer) for module in network.modules())


def recipe(size: int, **keys: Any) -> dict[str, Any]:
    return {"kw": 1, "name": "foreign", "model": {"input": [3, size, size]}, **keys}


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("convit_tiny", {"img_size": 32, "patch_size": 8, "depth": 3, "local_up_to_layer": 2}, 32),
        ("edgenext_xx_small", {}, 64),
        ("xcit_nano_12_p16_224", {"img_size": 32, "depth": 2}, 32),
    ],
)
def test_timm_networks_that_ask_a_weight_for_its_device_run_dynamic(name: str, options: Any, size: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4, **options)
    convert(network, recipe(size, stages="auto"))
    assert dynamic(network) > 0
    network(torch.randn(2, 3, size, size)).sum().backward()
    with torch.inference_mode():
        assert network.eval()(torch.randn(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("repvit_m0_9", ["stages.0.blocks.*.conv?.c"]),
        ("mobileone_s0", ["stages.0.*.conv"]),
    ],
)
def test_timm_reparameterizes_what_is_static_and_leaves_dynamic_layers_alone(name: str, layers: list[str]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4).eval()
    static = len(list(timm.utils.reparameterize_model(network).modules()))
    convert(network, recipe(64, warehouses={"a": {"layers": layers}}))
    set_temperature(network, 0.5)
    fused = timm.utils.reparameterize_model(network)
    assert dynamic(fused) == dynamic(network) > 0
    assert len(list(fused.modules())) < len(list(network.modules()))
    assert len(list(fused.modules())) > static
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(fused)(x), fused(x))


def test_ultralytics_fuses_its_norms_and_keeps_dynamic_layers_dynamic() -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    network = tasks.DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    layers = ["model.2.m.*.cv?.conv", "model.4.m.*.cv?.conv"]
    convert(network, {"kw": 1, "name": "yolo", "warehouses": {"a": {"layers": layers}}})
    set_temperature(network, 0.5)
    network.train()(torch.rand(2, 3, 64, 64))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval()(x)[0]
        fused = copy.deepcopy(network).fuse(verbose=False)
        assert fused.is_fused()
        assert dynamic(fused) == dynamic(network) == 6
        torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=1e-3)


def test_lightlys_momentum_update_takes_a_network_and_its_copy() -> None:
    utils = pytest.importorskip("lightly.models.utils")

    class BYOL(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            self.backbone_momentum = copy.deepcopy(self.backbone)
            utils.deactivate_requires_grad(self.backbone_momentum)

    model = BYOL()
    warehouses = {"a": {"layers": ["4.*.conv?"], "attention": {"norm": "layer"}}}
    callback = KWCallback({"kw": 1, "name": "byol", "warehouses": warehouses}, module="backbone")
    trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    callback.setup(trainer, model, "fit")
    cells = model.backbone_momentum[4][0].conv1.warehouse.cells.clone()
    with torch.no_grad():
        model.backbone[4][0].conv1.warehouse.cells.add_(1)
    utils.update_momentum(model.backbone, model.backbone_momentum, m=0.75)
    torch.testing.assert_close(model.backbone_momentum[4][0].conv1.warehouse.cells, cells + 0.25)


@pytest.mark.filterwarnings("ignore:.*takes dimension 0")
def test_torchaudios_conformer_mixes_samples_unless_it_is_told_where_its_batch_is() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    leaks = []
    for said in ({}, {"batch_dim": 1}):
        torch.manual_seed(0)
        network = torchaudio.models.Conformer(16, 2, 32, 2, 5).eval()
        warehouses = {"mlp": {"layers": ["*.ffn?.sequential.*"], **said}}
        convert(network, {"kw": 1, "name": "conformer", "warehouses": warehouses})
        set_temperature(network, 0.2)
        x, lengths = torch.randn(3, 7, 16), torch.tensor([7, 7, 7])
        other = torch.cat([x[:2], torch.randn(1, 7, 16)])
        with torch.no_grad():
            leaks.append(float((network(x, lengths)[0][0] - network(other, lengths)[0][0]).abs().max()))
    assert leaks[0] > 1e-2
    assert leaks[1] == 0
