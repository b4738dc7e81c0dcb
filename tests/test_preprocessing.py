"""Preprocessing belongs to the weights: the libraries' own where a recipe is silent, said where it is not."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model_weights

from kw_lightning.fit.data.transforms import evaluation_transform, transform
from kw_lightning.planning import plan
from kw_lightning.planning.table import total_lines
from kw_lightning.preprocessing import (
    Preprocessing,
    contradictions,
    own_preprocessing,
    preprocessing,
    warn_of_contradictions,
)
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe

TORCHVISION = [
    ("resnet18", "IMAGENET1K_V1"),
    ("resnet50", "IMAGENET1K_V2"),  # 232 → 224
    ("efficientnet_b3", "IMAGENET1K_V1"),  # bicubic, 320 → 300
    ("efficientnet_v2_l", "IMAGENET1K_V1"),  # mean and std 0.5
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),  # 518 → 518
    ("swin_t", "IMAGENET1K_V1"),
]
TIMM = [
    "convnext_tiny.in12k_ft_in1k",  # crop share 0.95
    "resnet10t.c3_in1k",  # 176
    "vit_base_patch16_224.augreg_in21k",  # mean and std 0.5
    "vit_base_patch16_clip_384.openai_ft_in12k_in1k",  # both sides scaled to 404, and cut
    "dm_nfnet_f0.dm_in1k",
    "mobilenetv3_small_100.lamb_in1k",
]


def recipe_with(backbone: str, pretrained: bool | str = True, **data: Any) -> Recipe:
    model = {"backbone": backbone, "pretrained": pretrained}
    return load_recipe({"kw": 1, "model": model, "data": {"name": "image_folder", **data}})


def random_images() -> list[Image.Image]:
    """Return noise with some structure, broad and high: an image that no filter leaves alone."""
    draw = np.random.default_rng(0)
    images = []
    for height, width in ((300, 420), (611, 500)):
        waves = np.sin(np.arange(height)[:, None, None] / 7) * np.cos(np.arange(width)[None, :, None] / 11)
        pixels = 128 + 60 * waves + draw.normal(0, 40, (height, width, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


@pytest.mark.parametrize(("name", "weights"), TORCHVISION)
def test_evaluation_is_torchvisions_own(name: str, weights: str) -> None:
    ours = transform(recipe_with(f"torchvision/{name}", weights), "eval")
    theirs = get_model_weights(name)[weights].transforms()
    for image in random_images():
        assert (ours(image) - theirs(image)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", TIMM)
def test_evaluation_is_timms_own(name: str) -> None:
    timm = pytest.importorskip("timm")
    ours = transform(recipe_with(f"timm/{name}"), "eval")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**config, is_training=False)
    for image in random_images():
        assert (ours(image) - theirs(image)).abs().max() <= 1e-6


def test_the_weights_that_are_named_decide() -> None:
    first, second = (
        own_preprocessing(recipe_with("torchvision/resnet50", weights)) for weights in ("IMAGENET1K_V1", True)
    )
    assert first is not None
    assert second is not None
    assert (first.resize, second.resize) == (256, 232)
    assert (first.source, second.source) == (
        "torchvision's ResNet50_Weights.IMAGENET1K_V1",
        "torchvision's ResNet50_Weights.IMAGENET1K_V2",
    )
    pytest.importorskip("timm")
    tagged = own_preprocessing(recipe_with("timm/convnext_tiny", "fb_in22k"))
    assert tagged is not None
    assert tagged.source == "timm's convnext_tiny.fb_in22k"


def test_another_size_keeps_the_share_of_the_crop() -> None:
    recipe = recipe_with("torchvision/resnet18", train={"size": 112})
    steps = preprocessing(recipe)
    assert steps is not None
    assert (steps.size, steps.resize) == (112, 128)
    assert transform(recipe, "eval")(random_images()[0]).shape == (3, 112, 112)


def test_images_of_one_size_keep_it_unless_pretrained_weights_want_another() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    fresh, warm = (recipe_with("torchvision/resnet18", value, name="cifar10") for value in (False, True))
    assert transform(fresh, "eval")(image).shape == (3, 32, 32)
    assert transform(warm, "eval")(image).shape == (3, 224, 224)
    assert transform(warm, "train")(image).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"input": [3, 64, 64], "layers": ["Flatten"]}, (0.485, 64, 73)),
        ({"input": [1, 28, 28], "layers": ["Flatten"]}, (None, 28, 32)),
        ({"backbone": "timm/resnet10t", "args": {"in_chans": 1}}, (None, 176, 201)),
        ({"backbone": "torchvision/resnet18", "input": [3, 96, 96]}, (0.485, 96, 109)),
    ],
)
def test_channels_and_input_of_the_network(model: dict[str, Any], expected: tuple[Any, ...]) -> None:
    own = own_preprocessing(load_recipe({"kw": 1, "model": model}))
    assert own is not None
    assert (own.mean[0] if own.mean else None, own.size, own.resize) == expected


@pytest.mark.parametrize("backbone", ["torchvision/fasterrcnn_resnet50_fpn", "torchvision/r3d_18"])
def test_other_tasks_have_their_own_ways(backbone: str) -> None:
    assert own_preprocessing(load_recipe({"kw": 1, "model": {"backbone": backbone}})) is None


def test_a_recipe_that_says_otherwise_beside_pretrained_is_warned_with_both_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    section = {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}
    recipe = recipe_with("torchvision/resnet18", train=section, eval={"interpolation": "bicubic"})
    with caplog.at_level(logging.WARNING):
        warn_of_contradictions(recipe)
    own = "torchvision's ResNet18_Weights.IMAGENET1K_V1"
    assert [record.message for record in caplog.records] == [
        f"data.eval.interpolation is bicubic, and the weights were trained with bilinear ({own})",
        f"data.train.mean is 0.5, 0.5, 0.5, and the weights were trained with 0.485, 0.456, 0.406 ({own})",
    ]
    assert contradictions(recipe_with("torchvision/resnet18", False, train=section)) == []
    assert contradictions(recipe_with("torchvision/resnet18")) == []


def test_plan_shows_values_and_where_they_come_from() -> None:
    lines = total_lines(plan(recipe_with("torchvision/resnet50", False, eval={"size": 160})))
    assert lines[-2:] == [
        "preprocessing     bilinear, shorter side 165, centre 160; mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225",
        "                  (torchvision's ResNet50_Weights.IMAGENET1K_V2; size from the recipe)",
    ]
    digits = total_lines(plan(load_recipe("digits-resnet")))
    assert digits[-2:] == [
        "preprocessing     bilinear, both sides 8; mean 0.305; std 0.376",
        "                  (mean and std from the recipe)",
    ]


@pytest.mark.parametrize(("name", "side"), [("digits", 8), ("mnist", 28), ("fashion_mnist", 28), ("cifar10", 32)])
def test_images_of_other_places_come_to_the_size_of_the_data_set(name: str, side: int) -> None:
    channels = 3 if name == "cifar10" else 1
    model = {"input": [channels, side, side], "layers": ["Flatten", {"Dense": {"units": 10}}]}

    def steps(**data: Any) -> Preprocessing:
        found = preprocessing(load_recipe({"kw": 1, "model": model, "data": {"name": name, **data}}))
        assert found is not None
        return found

    assert evaluation_transform(steps())(random_images()[0]).shape[1:] == (side, side)
    own = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    assert torch.equal(evaluation_transform(steps())(own), evaluation_transform(replace(steps(), size=None))(own))
    assert steps(train={"size": 16}).size == 16
    assert steps(train={"size": side, "crop": "random", "padding": 2}).size == side
    assert steps(eval={"resize": 40}).size is None  # evaluation sees what the recipe says


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "digits"}, 1),
        ({"name": "cifar10"}, 3),
        ({"name": "image_folder"}, 3),
        ({"name": "fake"}, 3),
        ({"name": "fake", "args": {"shape": [5, 8, 8]}}, 5),
    ],
)
def test_a_network_that_says_nothing_of_its_input_takes_the_channels_of_the_data(
    data: dict[str, Any], expected: int
) -> None:
    steps = preprocessing(load_recipe({"kw": 1, "model": {"backbone": "python:team.nets:small"}, "data": data}))
    assert steps is not None
    assert steps.channels == expected


def test_it_travels_as_plain_data() -> None:
    steps = preprocessing(recipe_with("torchvision/efficientnet_b3"))
    assert steps is not None
    again = Preprocessing.from_dict(steps.to_dict())
    assert again == steps
    image = random_images()[0]
    recipe = recipe_with("torchvision/efficientnet_b3")
    assert torch.equal(evaluation_transform(again)(image), transform(recipe, "eval")(image))


@pytest.mark.parametrize(
    "wrong", [{"gamma": 2}, {"size": 10**9}, {"size": True}, {"mean": "red"}, {"crop": ["center"]}, {"source": None}]
)
def test_a_strangers_preprocessing_is_refused_by_its_key(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(ValueError, match=f'^"{key}" cannot be'):
        Preprocessing.from_dict({"size": 8, **wrong})


def test_weights_of_a_network_of_ones_own_are_not_said_to_want_anything() -> None:
    layers = [{"Conv2D": {"filters": 4, "kernel_size": 3}}, "GlobalAveragePooling2D", {"Dense": {"units": 10}}]
    model = {"input": [1, 8, 8], "layers": layers, "pretrained": "static.safetensors"}
    data = {"name": "digits", "train": {"mean": [0.3], "std": [0.4]}}
    assert contradictions(load_recipe({"kw": 1, "model": model, "data": data})) == []
