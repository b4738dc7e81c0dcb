"""The authors' checkpoints against the keys and shapes recorded of them, in and out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.builder import build
from kw_lightning.errors import RunError
from kw_lightning.inference.fitting import PUBLISHED, fitting_recipe
from kw_lightning.nn import warehouses
from kw_lightning.published import (
    backbone_tensors,
    load_published,
    published_entries,
    read_published,
    write_published,
)
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

STATES = {path.stem: path for path in (Path(__file__).parents[1] / "data" / "published" / "state").glob("kw*.json")}


def recipe_of(recorded: str) -> Recipe:
    budget, _, network = recorded.removeprefix("kw").partition("_")
    return load_recipe(f"{network.replace('_', '-')}-kw-{budget}")


def backbone_of(recipe: Recipe) -> str:
    assert recipe.model is not None
    assert recipe.model.backbone is not None
    return recipe.model.backbone


def on_meta(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return build(recipe)


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build(load_recipe("resnet18-kw-1d2x"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return drawn(json.loads(STATES["kw1d2x_resnet18"].read_text()))


def test_nine_configurations_are_recorded() -> None:
    assert len(STATES) == 9


@pytest.mark.parametrize("recorded", sorted(STATES))
def test_keys_and_shapes_are_those_that_the_authors_write(recorded: str) -> None:
    recipe = recipe_of(recorded)
    entries = published_entries(on_meta(recipe), backbone_of(recipe))
    assert {entry.published: list(entry.shape) for entry in entries} == json.loads(STATES[recorded].read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_recipe_has_one_published_key_for_each_tensor(name: str) -> None:
    recipe = load_recipe(name)
    network = on_meta(recipe)
    entries = published_entries(network, backbone_of(recipe))
    assert len({entry.published for entry in entries}) == len(entries)
    left = network.state_dict().keys() - {entry.ours for entry in entries}
    assert all("temperature" in key or "extra_state" in key for key in left)


def test_weights_come_in_and_go_out_unchanged(network: nn.Module, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    load_published(network, "torchvision/resnet18", tensors, temperature=0.25)
    assert {float(warehouse.temperature) for warehouse in warehouses(network).values()} == {0.25}
    file = tmp_path / "official.pth"
    write_published(network, "torchvision/resnet18", file)
    back = read_published(file)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[key], value.to(back[key].dtype)) for key, value in tensors.items())


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_checkpoints_are_read(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    inner = {f"{prefix}fc.bias": torch.arange(3.0)}
    content = inner if wrapper is None else {wrapper: inner, "epoch": 299, "args": argparse.Namespace(lr=4e-3)}
    torch.save(content, tmp_path / "official.pth")
    assert torch.equal(read_published(tmp_path / "official.pth")["fc.bias"], torch.arange(3.0))


def test_averaged_weights_are_read_when_asked_for(tmp_path: Path) -> None:
    torch.save({"model": {"fc.bias": torch.zeros(2)}, "model_ema": {"fc.bias": torch.ones(2)}}, tmp_path / "both.pth")
    torch.save({"model": {"fc.bias": torch.zeros(2)}}, tmp_path / "one.pth")
    assert read_published(tmp_path / "both.pth", averaged=True)["fc.bias"].sum() == 2
    with pytest.raises(RunError, match="found no state_dict of tensors under model_ema"):
        read_published(tmp_path / "one.pth", averaged=True)


def test_a_checkpoint_with_code_inside_runs_none_of_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RunError, match="not a checkpoint, or a damaged one"):
        read_published(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_cut_file_is_one_message(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    with pytest.raises(RunError, match=r"cut\.pth: not a checkpoint, or a damaged one"):
        read_published(tmp_path / "cut.pth")


def test_what_does_not_fit_is_named(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    wrong = {**tensors, "fc.weight": torch.zeros(10, 512), "extra": torch.zeros(1)}
    del wrong["bn1.bias"]
    with pytest.raises(RunError) as caught:
        load_published(network, "torchvision/resnet18", wrong)
    assert str(caught.value) == (
        "the checkpoint does not fit the network: 1 missing (bn1.bias); 1 left over (extra); "
        "1 of another shape (fc.weight: [10, 512] instead of [1000, 512])"
    )


def test_the_configuration_that_fits_is_found(tensors: dict[str, Tensor]) -> None:
    assert fitting_recipe(tensors) == "resnet18-kw-1d2x"


def test_a_detectors_backbone_is_read_without_a_classifier(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    inside = {f"backbone.{key}": value for key, value in tensors.items() if not key.startswith("fc.")}
    found = backbone_tensors({**inside, "neck.fpn.weight": torch.zeros(1), "backbone.norm0.weight": torch.zeros(1)})
    before = network.state_dict()["fc.weight"].clone()
    load_published(network, "torchvision/resnet18", found, backbone_only=True)
    after = network.state_dict()
    assert torch.equal(after["fc.weight"], before)
    assert torch.equal(after["conv1.weight"], tensors["conv1.weight"])
    with pytest.raises(RunError, match=r"2 missing \(fc\.weight, fc\.bias\)"):
        load_published(network, "torchvision/resnet18", found)


def test_a_network_that_was_not_published_is_refused() -> None:
    with pytest.raises(RunError, match="the authors' layout is known of their networks only"):
        published_entries(nn.Linear(2, 2), "timm/resnet18")
