"""Checkpoints of KWCallback: they know their recipe, load without a Trainer, and refuse other networks."""

from __future__ import annotations

import copy
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, Net, loader, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

import kw_lightning
from kw_lightning.callbacks import KWCallback, load_from_checkpoint
from kw_lightning.callbacks.layout import differences, layout
from kw_lightning.errors import KWError, RunError
from kw_lightning.nn import KWLayer, warehouses

HALF = {**RECIPE, "defaults": {"budget": "1/2"}}


class Saved(Classifier):
    """Keeps its arguments in the checkpoint."""

    def __init__(self, classes: int = 4, late: bool = False) -> None:
        super().__init__(nn.Identity() if late else Net(classes))
        self.save_hyperparameters()

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net(self.hparams.classes)


class Restoring(Saved):
    """Has a hook of its own for loading, which calls that of its base."""

    restored = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        assert isinstance(self.net.conv1, KWLayer)
        self.restored += 1


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Saved, Path]:
    model = Saved(classes=6)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    return model.eval(), tmp_path / "a.ckpt"


def equal_weights(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_loads_without_a_trainer(trained: tuple[Saved, Path]) -> None:
    model, path = trained
    loaded = load_from_checkpoint(Saved, path, map_location="cpu").eval()
    assert type(loaded) is Saved
    assert loaded.hparams.classes == 6
    assert equal_weights(loaded, model)
    assert float(warehouses(loaded)["head"].temperature) == 0.5
    x = loader().dataset.tensors[0]
    assert torch.equal(loaded(x), model(x))
    assert "on_load_checkpoint" not in vars(Saved)


def test_layers_built_in_configure_model(tmp_path: Path) -> None:
    model = Saved(late=True)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "late.ckpt")
    assert equal_weights(load_from_checkpoint(Saved, tmp_path / "late.ckpt"), model)


@pytest.mark.parametrize("late", [False, True])
def test_a_trainer_loads_into_a_fresh_module(tmp_path: Path, late: bool) -> None:
    model = Saved(late=late)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    (expected,) = run.test(model, loader(), verbose=False)
    fresh = Saved(late=late)
    (found,) = trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).test(
        fresh, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert equal_weights(fresh, model)
    assert found == expected


def test_the_users_own_hook_still_runs(tmp_path: Path) -> None:
    class Hooked(Saved):
        seen = 0

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            type(self).seen += 1

    model = Hooked()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    own = Hooked.__dict__["on_load_checkpoint"]
    assert equal_weights(load_from_checkpoint(Hooked, tmp_path / "a.ckpt"), model)
    assert Hooked.seen == 1
    assert Hooked.__dict__["on_load_checkpoint"] is own


def test_a_subclass_that_the_checkpoint_names_loads_without_its_class(tmp_path: Path) -> None:
    model = Restoring()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["hyper_parameters"] |= {  # as LightningCLI writes them in subclass mode
        "_class_path": f"{__name__}.Restoring",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    own, inherited = Restoring.__dict__["on_load_checkpoint"], LightningModule.on_load_checkpoint
    loaded = load_from_checkpoint(LightningModule, tmp_path / "a.ckpt")
    assert type(loaded) is Restoring
    assert loaded.restored == 1
    assert equal_weights(loaded, model)
    assert Restoring.__dict__["on_load_checkpoint"] is own
    assert LightningModule.on_load_checkpoint is inherited


def test_what_is_no_checkpoint_is_told(trained: tuple[Saved, Path], tmp_path: Path) -> None:
    _, path = trained
    whole = path.read_bytes()
    middle = len(whole) // 2
    for name, content in {
        "cut": whole[:middle],
        "changed": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "text": b"hello",
        "empty": b"",
    }.items():
        damaged = tmp_path / f"{name}.ckpt"
        damaged.write_bytes(content)
        with pytest.raises(RunError, match=rf"{name}\.ckpt: not a checkpoint, or a damaged one \("):
            load_from_checkpoint(Saved, damaged)
    for foreign, missing in (([1], "state_dict and pytorch-"), ({"state_dict": {}}, "pytorch-")):
        torch.save(foreign, tmp_path / "foreign.ckpt")
        with pytest.raises(RunError, match=rf"foreign\.ckpt: not a checkpoint of Lightning, which has {missing}"):
            load_from_checkpoint(Saved, tmp_path / "foreign.ckpt")
    with pytest.raises(RunError, match=r"found a folder, allowed: one file; a checkpoint in shards is loaded by"):
        load_from_checkpoint(Saved, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Saved, tmp_path / "none.ckpt")
    for cls, found in ((Net, "the class Net"), (Saved(), "an object of Saved")):
        with pytest.raises(TypeError, match=f"^found {found}, allowed: a class that is a LightningModule$"):
            load_from_checkpoint(cls, path)  # type: ignore[type-var]


class Touches:
    """What a stranger's pickle does when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_code_of_a_file_is_run(trained: tuple[Saved, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = trained
    torch.save({**torch.load(path), "more": Touches(tmp_path / "ran")}, tmp_path / "b.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert equal_weights(load_from_checkpoint(Saved, f"{address}/a.ckpt"), model)
        for place in (tmp_path / "b.ckpt", f"{address}/b.ckpt"):
            with pytest.raises(UnpicklingError):
                load_from_checkpoint(Saved, place)
        server.shutdown()
    assert not (tmp_path / "ran").exists()


def test_weights_only_checkpoints_need_the_recipe(tmp_path: Path) -> None:
    model = Saved()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    run.fit(model, loader())
    path = tmp_path / "weights.ckpt"
    run.save_checkpoint(path, weights_only=True)
    with pytest.raises(KWError, match=r"has no recipe, as checkpoints with save_weights_only: give it as recipe="):
        load_from_checkpoint(Saved, path)
    assert equal_weights(load_from_checkpoint(Saved, path, recipe=RECIPE), model)
    with pytest.raises(KWError, match=r"saved with another recipe, or with none: \"net\.conv1\.warehouse\.cells\" is"):
        load_from_checkpoint(Saved, path, recipe=HALF)


def test_weights_only_checkpoints_of_a_submodule_and_its_copy(tmp_path: Path) -> None:
    class Momentum(Saved):
        def __init__(self) -> None:
            super().__init__()
            self.momentum = copy.deepcopy(self.net).requires_grad_(False)

    inner = {"kw": 1, "name": "inner", "warehouses": {"a": {"layers": ["conv?"]}}}
    model = Momentum()
    run = trainer(tmp_path, callbacks=[KWCallback(inner, module="net")])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Momentum, tmp_path / "weights.ckpt", recipe=inner, module="net")
    assert equal_weights(loaded, model)
    assert isinstance(loaded.momentum.conv1, KWLayer)


def test_another_recipe_is_refused_in_words(trained: tuple[Saved, Path], tmp_path: Path) -> None:
    _, path = trained
    message = r'warehouse "convolutions" has cells 27×8×8×1×1, here 13×8×8×1×1'
    with pytest.raises(KWError, match=f"the warehouses in {path} are not those of this network: .*{message}"):
        load_from_checkpoint(Saved, path, recipe=HALF)
    with pytest.raises(
        KWError, match=r'another recipe.*"net.conv1.warehouse.cells" is \[27, 8, 8, 1, 1\] in the weights and \[13'
    ):
        trainer(tmp_path, callbacks=[KWCallback(HALF)]).test(Saved(classes=6), loader(), ckpt_path=path)
    with pytest.raises(RuntimeError, match=r"conv1\.warehouse\.cells"):
        trainer(tmp_path).test(Saved(classes=6), loader(), ckpt_path=path)


def test_a_static_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Saved(), loader())
    run.save_checkpoint(tmp_path / "static.ckpt")
    with pytest.raises(
        KWError, match=r'or with none: "net\.conv1" is static in the weights and dynamic here.*warm_start'
    ):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).test(Saved(), loader(), ckpt_path=tmp_path / "static.ckpt")
    with pytest.raises(KWError, match=r'or with none: "net\.conv1" is static in the weights and dynamic here'):
        load_from_checkpoint(Saved, tmp_path / "static.ckpt", recipe=RECIPE)
    baseline = load_from_checkpoint(Saved, tmp_path / "static.ckpt")
    assert not any(isinstance(module, KWLayer) for module in baseline.modules())
    model = Saved()
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).validate(model, loader(), verbose=False)
    with pytest.raises(RuntimeError, match="Missing key"):  # after the run the module is as any other
        model.load_state_dict(torch.load(tmp_path / "static.ckpt")["state_dict"])


def test_averaged_checkpoints_have_the_temperature_of_their_step(tmp_path: Path) -> None:
    model = Saved()
    checkpoint = ModelCheckpoint(tmp_path, filename="ema", every_n_train_steps=4, save_top_k=-1)
    callbacks = [KWCallback(RECIPE), EMAWeightAveraging(decay=0.9), checkpoint]
    trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(model, loader())
    saved = torch.load(tmp_path / "ema.ckpt")
    found = {name: float(value) for name, value in saved["state_dict"].items() if name.endswith("temperature")}
    assert found == pytest.approx({"net.conv1.warehouse.temperature": 0.6, "net.head.warehouse.temperature": 0.6})
    averaged, current = saved["state_dict"]["net.stem.weight"], saved["current_model_state"]["net.stem.weight"]
    assert not torch.equal(averaged, current)
    assert torch.equal(load_from_checkpoint(Saved, tmp_path / "ema.ckpt").net.stem.weight, averaged)


def test_a_checkpoint_is_plain_data(trained: tuple[Saved, Path]) -> None:
    _, path = trained
    (entry,) = torch.load(path, weights_only=True)["kw_lightning"]
    assert entry["module"] is None
    assert entry["recipe"]["warehouses"]["head"]["layers"] == ["net.head"]
    assert entry["layout"]["head"] == {
        "cells": [1, 6, 16],
        "layers": {"net.head": {"kernel": [6, 16], "first_cell": 0}},
    }


def test_differences_of_layouts() -> None:
    def laid_out(**changes: Any) -> dict[str, Any]:
        model = Classifier()
        kw_lightning.convert(model, {**RECIPE, **changes})
        return layout(model)

    first = laid_out()
    assert differences(first, laid_out()) == []
    assert differences(first, laid_out(**HALF))[0].startswith('warehouse "convolutions" has cells 27×8×8×1×1, here 13×')
    other = laid_out(warehouses={"convolutions": {"layers": ["net.conv2"]}, "more": {"layers": ["net.conv1"]}})
    assert differences(first, other)[:2] == ['warehouse "head" is missing', 'warehouse "more" is new']
    assert 'layer "net.conv1" of warehouse "convolutions" is missing' in differences(first, other)
    assert 'layer "net.conv1" of warehouse "convolutions" is new' in differences(other, first)
    assert any("starts at cell 9 with kernel 16×8×3×3, here 0 and" in text for text in differences(first, other))
