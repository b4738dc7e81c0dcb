"""Checkpoints of a LightningModule with KWCallback are evaluated and predict as those of `kw-fit` do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.nn import functional
from typer.testing import CliRunner

import kw_lightning
from kw_lightning.builder import make_static
from kw_lightning.callbacks import KWCallback
from kw_lightning.callbacks.checkpoint import KEY
from kw_lightning.cli import application
from kw_lightning.errors import KWError
from kw_lightning.fit import evaluate
from kw_lightning.fit.data import data_module
from kw_lightning.recipe import load_recipe
from kw_lightning.report import report

DATA = {"name": "fake", "args": {"shape": [3, 8, 8], "classes": 4, "train": 12, "evaluation": 30}}
LAYERS = [
    *(
        {"Conv2D": {"filters": 8, "kernel_size": 3, "name": name, "padding": "same"}}
        for name in ("stem", "first", "second")
    ),
    {"BatchNormalization": {}},
    {"GlobalAveragePooling2D": {}},
    {"Dense": {"units": 4, "name": "head"}},
]
NETWORK = {"input": [3, 8, 8], "layers": LAYERS}
MODEL = [f"model={json.dumps(NETWORK)}"]
BARE = {"kw": 1, "name": "bare", "warehouses": {"tail": {"layers": ["net.first", "net.second"], "budget": "1/2"}}}
NARROWED = {"name": "*", "type": "Conv2d", "exclude": ["stem"]}
ALL = {**BARE, "warehouses": {"tail": {"layers": [NARROWED]}}, "model": NETWORK, "data": DATA}


class Own(LightningModule):
    """A module as a user has it, with more in it than the network."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_static(load_recipe({"kw": 1, "model": NETWORK}))
        self.scale = torch.nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return functional.cross_entropy(self(batch[0]) * self.scale.weight.mean(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(file: Path, callback: KWCallback, module: Own) -> Own:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **options)
    data = data_module(load_recipe({"kw": 1, "data": DATA}))
    data.classes = ("cat", "dog", "eel", "fox")
    trainer.fit(module, data)
    trainer.save_checkpoint(file)
    return module.eval()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Own]:
    """Return a checkpoint whose recipe has the LightningModule's names and no network, and the module."""
    file = tmp_path_factory.mktemp("own") / "own.ckpt"
    return file, train(file, KWCallback(BARE), Own())


def accuracy(module: Own) -> float:
    images, targets = next(iter(data_module(load_recipe({"kw": 1, "data": DATA, "model": NETWORK})).val_dataloader()))
    with torch.no_grad():
        return float((module(images).argmax(dim=1) == targets).float().mean())


def test_evaluation_is_that_of_the_module_whatever_the_network_is_called(
    bare: tuple[Path, Own], caplog: pytest.LogCaptureFixture
) -> None:
    file, module = bare
    found = evaluate(file, [*MODEL, f"data={DATA}"])
    assert found.metrics["accuracy"] == pytest.approx(accuracy(module))
    assert found.epoch == 1
    assert "does not say how images are prepared, so it is as of ImageNet's usual values: data.eval" in caplog.text


def test_a_recipe_that_names_all_needs_nothing_more(tmp_path: Path) -> None:
    file = tmp_path / "own.ckpt"
    with pytest.warns(UserWarning, match="ignored the sections"):
        callback = KWCallback(ALL, module="net")
    module = train(file, callback, Own())
    state = torch.load(file, weights_only=True)
    compiled = {key.replace("net.", "net._orig_mod."): value for key, value in state["state_dict"].items()}
    (entry,) = state[KEY]
    images = torch.rand(2, 3, 8, 8)
    for _ in range(2):
        assert evaluate(file).metrics["accuracy"] == pytest.approx(accuracy(module))
        with torch.no_grad():
            # close, not equal: what is loaded finishes outputs inside the compiled passes
            torch.testing.assert_close(kw_lightning.load(file)(images), module(images))
        # as self.net = torch.compile(self.net) names them
        torch.save({**state, "state_dict": compiled, KEY: [{**entry, "module": "net._orig_mod"}]}, file)


def test_prediction_has_the_names_of_the_data_module_and_outlives_the_checkpoint(
    bare: tuple[Path, Own], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, module = bare
    loaded = kw_lightning.load(file, overrides=MODEL)
    assert loaded.classes == ("cat", "dog", "eel", "fox")
    assert "does not say how images are prepared, so it is as of ImageNet's usual values" in caplog.text
    assert "data.eval (kw predict with --set" in caplog.text
    loaded.save_pretrained(tmp_path / "model")
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(kw_lightning.load(tmp_path / "model")(images), module(images))


def test_the_commands_take_what_is_missing(bare: tuple[Path, Own], tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    sets = [part for change in MODEL for part in ("--set", change)]
    call: Callable[..., Any] = CliRunner().invoke
    command = ["predict", str(bare[0]), str(tmp_path), *sets, "--classes", str(tmp_path / "names.txt")]
    done = call(application(), command)
    assert done.exit_code == 0, done.output
    assert any(f"red.png  {name} " in done.stdout for name in "abcd")
    (tmp_path / "names.txt").write_text("a\n")
    assert "1 names of classes are given, and the network has 4 outputs" in call(application(), command).output


def test_what_cannot_be_used_is_one_message(bare: tuple[Path, Own], tmp_path: Path) -> None:
    file, _ = bare
    state = torch.load(file, weights_only=True)
    entry, weights = state[KEY][0], state["state_dict"]
    twin = {key.replace("net.", "twin."): value for key, value in weights.items() if key.startswith("net.")}
    moved = copy.deepcopy(entry)
    moved["layout"]["tail"]["layers"]["net.second"]["first_cell"] = 3
    other = {**DATA, "args": {**DATA["args"], "classes": 7}}
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({}, [], r"its recipe names no network.*model\.backbone"),
        ({}, MODEL, r"its recipe names no data: give it, as data\.name"),
        ({}, [*MODEL, "data.name=digits"], "the network does not take the images"),
        ({}, [*MODEL, f"data={other}"], "4 outputs and the data has 7"),
        ({}, ["model.backbone=torchvision/squeezenet1_1"], "is nowhere among the weights.*another model.backbone"),
        ({}, [*MODEL, "model.layers[5].Dense.units=5"], r'head\.weight" is \[4, 8\] in the weights and \[5, 8'),
        ({"state_dict": {**weights, **twin}}, MODEL, r"several times \(net\., twin\.\).*module="),
        ({KEY: [entry, entry]}, MODEL, "2 recipes, one for each KWCallback"),
        ({KEY: [{**entry, "recipe": "/etc/passwd"}]}, MODEL, "no recipe inside"),
        ({KEY: [moved]}, MODEL, "starts at cell 3"),
    ]
    for changes, overrides, message in cases:
        torch.save({**state, **changes}, tmp_path / "altered.ckpt")
        with pytest.raises(KWError, match=message) as caught:
            evaluate(tmp_path / "altered.ckpt", overrides)
        assert len(str(caught.value).splitlines()) == 1


def test_a_report_of_such_a_checkpoint_shows_what_is_given(bare: tuple[Path, Own], tmp_path: Path) -> None:
    file, _ = bare
    page = report(file, output=tmp_path / "alone.html").html
    assert "The recipe names no network" in page
    assert "Checkpoint and data were not looked at" in page
    page = report(file, [*MODEL, f"data={DATA}"], output=tmp_path / "given.html").html
    assert "tail: mean attention" in page
    assert "Confusion matrix" in page
    assert "eel" in page
