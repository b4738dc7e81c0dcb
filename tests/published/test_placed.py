"""`model.pretrained: published`: the authors' checkpoints, put into a folder by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.builder import build, starts_warm
from kw_lightning.callbacks import TemperatureAnnealing
from kw_lightning.errors import RunError
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.trainer import make_callbacks
from kw_lightning.nn import warehouses
from kw_lightning.published import backbone_tensors, misfit, placed_folder, published_entries, to_published
from kw_lightning.published.checkpoint import HEADS
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

NAME = "mobilenetv2-050-kw-1x"
STATES = Path(__file__).parents[1] / "data" / "published" / "state"


def recipe_of(classes: int) -> Recipe:
    model = {"pretrained": "published", "args": {"num_classes": classes}}
    return load_recipe({"kw": 1, "name": "mine", "extends": NAME, "model": model})


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    """Return a checkpoint's tensors: of a network in the authors' layout, other than a fresh one's."""
    torch.manual_seed(1)
    return to_published(build(load_recipe(NAME)), "torchvision/mobilenet_v2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert placed_folder() == tmp_path / "kw_lightning" / "published"
    placed_folder().mkdir(parents=True)
    return placed_folder()


def test_it_says_where_the_file_has_to_be_put(folder: Path) -> None:
    with pytest.raises(RunError, match=rf"put the authors' checkpoint of mine into {folder}, .*KernelWarehouse links"):
        build(recipe_of(1000))


def test_the_checkpoint_that_fits_is_taken_at_temperature_0(folder: Path, authors: dict[str, Tensor]) -> None:
    (folder / "a.pth").write_bytes(b"nothing")
    torch.save({"model": {"conv1.weight": torch.zeros(2)}}, folder / "b.pth")
    with pytest.raises(RunError, match=r"there are: .*a\.pth: not a checkpoint.*; b\.pth does not fit: \d+ missing"):
        build(recipe_of(1000))
    torch.save({"model": authors}, folder / "c.pth.tar")
    network = build(recipe_of(1000))
    found = to_published(network, "torchvision/mobilenet_v2")
    assert all(torch.equal(found[key], tensor) for key, tensor in authors.items())
    assert {float(warehouse.temperature) for warehouse in warehouses(network).values()} == {0.0}


def test_a_classifier_of_another_size_starts_anew(
    folder: Path, authors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(authors, folder / "official.pth")
    network = build(recipe_of(10))
    assert network.state_dict()["classifier.1.weight"].shape[0] == 10
    assert torch.equal(network.state_dict()["features.18.1.weight"], authors["features.18.1.weight"])
    assert "official.pth has no classifier of this size" in caplog.text


def test_a_run_stays_at_temperature_0(tmp_path: Path) -> None:
    recipe = recipe_of(10)
    assert not starts_warm(recipe)
    for started, expected in ((recipe, 0.0), (replace(recipe, model=replace(recipe.model, pretrained=False)), 0.9)):
        (annealing,) = [
            callback
            for callback in make_callbacks(started, RunFolder(tmp_path))
            if isinstance(callback, TemperatureAnnealing)
        ]
        assert annealing.at(1, 10) == pytest.approx(expected)


def static(backbone: str) -> nn.Module:
    return build(load_recipe({"kw": 1, "name": "static", "model": {"backbone": backbone}}))


DETECTION = (
    "resnet50-kw-1x",
    "resnet50-kw-4x",
    "mobilenetv2-100-kw-1x",
    "mobilenetv2-100-kw-4x",
    "convnext-tiny-kw-1x",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/convnext_tiny",
)
"""Backbones of the authors' Mask R-CNNs, dynamic and static."""
RECORDED = {
    "resnet50-kw-1x": "kw1x_resnet50",
    "mobilenetv2-100-kw-4x": "kw4x_mobilenetv2_100",
    "convnext-tiny-kw-1x": "kw1x_convnext_tiny",
}


@pytest.mark.parametrize("name", DETECTION)
def test_a_detectors_backbone_has_all_but_the_classifier(name: str) -> None:
    recipe = None if "/" in name else load_recipe(name)
    backbone = name if recipe is None else str(recipe.model.backbone if recipe.model else "")
    with torch.device("meta"):
        entries = published_entries(static(name) if recipe is None else build(recipe), backbone)
    keys = {entry.published: list(entry.shape) for entry in entries}
    if name in RECORDED:
        keys = json.loads((STATES / f"{RECORDED[name]}.json").read_text())
    of_detector = {
        f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in keys.items() if not key.startswith(HEADS)
    }
    others = {key: torch.empty(3) for key in ("backbone.norm0.weight", "neck.lateral_convs.0.conv.weight")}
    assert not misfit(entries, backbone_tensors({**of_detector, **others}), backbone_only=True)
    assert misfit(entries, backbone_tensors({**of_detector, "backbone.extra": torch.empty(1)}), backbone_only=True)
