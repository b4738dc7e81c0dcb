"""The authors' configuration files as recipes that plan the same network.

Their code names every layer (`stage1_layer0_conv1`) and cuts every part of a name down to the beginnings that
`sharing_range` lists; layers whose names are then the same share a warehouse. A `sharing_range` given as a text is read
letter by letter there, and so it is here: "layer_conv" means the letters l, a, y, e, r, _, c, o, n and v.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kw_lightning.errors import RunError, first_line, mistake
from kw_lightning.recipe.writing import to_yaml

METHOD = {
    "model",
    "reduction",
    "cell_num_ratio",
    "cell_inplane_ratio",
    "cell_outplane_ratio",
    "sharing_range",
    "nonlocal_basis_ratio",
    "drop_path",
}
"""Keys that say what the network is; the others are of the training."""
SHIPPED = {
    "kw1d2x_mobilenetv2_050": "mobilenetv2-050-kw-1d2x",
    "kw1d2x_mobilenetv2_100": "mobilenetv2-100-kw-1d2x",
}
"""Networks whose warehouses stand in the authors' code instead of a configuration."""
MAX_BYTES = 1 << 20

Named = tuple[str, str]
"""Our name of a layer, and the authors' name of the warehouse that it asks for."""


@dataclass(frozen=True)
class _Network:
    """A network of the authors.

    Attributes:
        backbone, args: as in a recipe.
        layers: the layers in the order in which they are made.
        sharing_range: unless the configuration gives one.
        norm: of the attention.
        depth: the argument that takes `drop_path`, None where the network has none.
    """

    backbone: str
    args: Mapping[str, Any]
    layers: Sequence[Named]
    sharing_range: Sequence[str] | None
    norm: str = "batch"
    depth: str | None = "stochastic_depth_prob"


def read_configuration(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return (a recipe as plain data, keys of the file that a network does not have).

    Raises:
        RunError: no such file, **or** one that is no configuration of KernelWarehouse.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RunError(f"{path}: larger than {MAX_BYTES:,} bytes; a configuration is a few lines of JSON")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a configuration in JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: {mistake(content, 'a map with the key model')}")
    try:
        return recipe_of(content, path.stem), sorted(content.keys() - METHOD)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def recipe_of(configuration: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the recipe of a configuration, as plain data.

    Raises:
        ValueError: a value that the authors' code does not take either.
    """
    model = configuration.get("model")
    networks = _networks()
    if model in SHIPPED:
        return {"kw": 1, "name": name.replace("_", "-"), "extends": SHIPPED[model]}
    if not isinstance(model, str) or model not in networks:
        raise ValueError(f"model: {mistake(model, sorted({*networks, *SHIPPED}))}")
    network = networks[model]
    shared = configuration.get("sharing_range", network.sharing_range)
    if shared is None or not all(isinstance(part, str) for part in shared):
        raise ValueError(f"sharing_range: {mistake(shared, 'a list of beginnings, as [layer, conv]')}")
    warehouses: dict[str, list[str]] = {}
    for layer, warehouse in network.layers:
        warehouses.setdefault(_fused(warehouse, shared), []).append(layer)
    numbers = {key: _numbers(configuration, key, len(warehouses)) for key in _RATIOS}
    args = dict(network.args)
    if network.depth and configuration.get("drop_path"):
        args[network.depth] = configuration["drop_path"]
    settings = [
        _settings({key: numbers[key][place] for key in numbers}, network.norm) for place in range(len(warehouses))
    ]
    alike = all(found == settings[0] for found in settings)
    return {
        "kw": 1,
        "name": name.replace("_", "-"),
        "model": {"backbone": network.backbone, "args": args},
        **({"defaults": settings[0]} if alike else {}),
        "warehouses": {
            title.replace("_", "-"): {"layers": layers, **({} if alike else own)}
            for (title, layers), own in zip(warehouses.items(), settings, strict=True)
        },
    }


def configuration_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe made from a configuration as YAML."""
    return "# The network of one of the authors' configurations; `kw plan` shows what it is.\n" + to_yaml(recipe)


_RATIOS = {
    "reduction": 0.0625,
    "cell_num_ratio": 1,
    "cell_inplane_ratio": 1,
    "cell_outplane_ratio": 1,
    "nonlocal_basis_ratio": 1,
}
"""Numbers of every warehouse, and what the authors' code takes where none is given."""


def _settings(ratios: Mapping[str, Fraction], norm: str) -> dict[str, Any]:
    attention: dict[str, Any] = {"reduction": _written(ratios["reduction"]), "norm": norm}
    if ratios["nonlocal_basis_ratio"] < 1:
        attention["basis"] = _written(ratios["nonlocal_basis_ratio"])
    return {
        "budget": _written(ratios["cell_num_ratio"]),
        "cell": {"out": _written(ratios["cell_outplane_ratio"]), "in": _written(ratios["cell_inplane_ratio"])},
        "attention": attention,
    }


def _written(number: Fraction) -> int | str:
    return number.numerator if number.denominator == 1 else str(number)


def _numbers(configuration: Mapping[str, Any], key: str, count: int) -> list[Fraction]:
    """Return a number for every warehouse: one for all, or a list with one for each."""
    given = configuration.get(key, _RATIOS[key])
    values = given if isinstance(given, list) else [given]
    values = values * count if len(values) == 1 else values
    if len(values) != count or not all(isinstance(value, int | float) and value > 0 for value in values):
        raise ValueError(f"{key}: {mistake(given, f'a number above 0, or a list of 1 or {count} of them')}")
    return [Fraction(str(value)) for value in values]


def _fused(warehouse: str, sharing_range: Iterable[str]) -> str:
    parts = []
    for part in warehouse.split("_"):
        for beginning in sharing_range:
            if part.startswith(beginning):
                part = beginning
        parts.append(part)
    return "_".join(parts)


def _networks() -> dict[str, _Network]:
    resnet = ("layer", "conv")
    classes = {"num_classes": 1000}
    return {
        "kw_resnet18": _Network("torchvision/resnet18", classes, _resnet((2, 2, 2, 2), 2), resnet),
        "kw_resnet50": _Network("torchvision/resnet50", classes, _resnet((3, 4, 6, 3), 3), resnet),
        **{
            f"kw_mobilenetv2_{name}": _Network(
                "torchvision/mobilenet_v2",
                {**classes, "width_mult": width, "dropout": 0},
                _mobilenet(),
                None,
                depth=None,
            )
            for name, width in (("050", 0.5), ("100", 1.0))
        },
        "kw_convnext_tiny": _Network(
            "torchvision/convnext_tiny", classes, _convnext((3, 3, 9, 3)), ("layer", "pwconv"), "layer"
        ),
    }


def _resnet(blocks: Sequence[int], convolutions: int) -> list[Named]:
    """Name the layers of a ResNet: what leads into a stage asks for the warehouse of the stage before."""
    named: list[Named] = []
    before = 0  # the number that the layers in front of a stage count to
    for stage, count in enumerate(blocks):
        for block in range(count):
            place = f"layer{stage + 1}.{block}"
            opens = block == 0
            if opens and stage > 0:
                named.append((f"{place}.downsample.0", f"stage{stage - 1}_layer{before + 1}_conv0"))
            first = stage - 1 if opens else stage
            # The first stage has none before it: its first 3×3 convolution stays there, a 1×1 one is static.
            if first >= 0 or convolutions == 2:
                named.append((f"{place}.conv1", f"stage{max(first, 0)}_layer{before if opens else block}_conv0"))
            named += [
                (f"{place}.conv{number + 1}", f"stage{stage}_layer{0 if opens else block}_conv{number}")
                for number in range(1, convolutions)
            ]
        before = count
    return named


_MOBILENET_STAGES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (6, 1))
"""(stage, blocks) of MobileNetV2's groups of blocks."""


def _mobilenet() -> list[Named]:
    named: list[Named] = [("features.0.0", "stage0_conv0")]
    block, number, earlier = 1, 0, None
    for stage, count in _MOBILENET_STAGES:
        for place in range(count):
            opens = place == 0 and earlier is not None and earlier != stage
            prefix = f"stage{stage - 1 if opens else stage}_layer{number}"
            module = f"features.{block}.conv"
            if block == 1:  # without a widening layer
                named += [(f"{module}.0.0", f"{prefix}_dwconv0"), (f"{module}.1", f"{prefix}_pwconv1")]
            else:
                named += [
                    (f"{module}.0.0", f"{prefix}_pwconv0"),
                    (f"{module}.1.0", f"{prefix}_dwconv0"),
                    (f"{module}.2", f"{prefix}_pwconv1"),
                ]
            block += 1
            number = 0 if opens else number + 1
        earlier = stage
    return [*named, (f"features.{block}.0", f"stage{earlier}_layer{number}_pwconv1")]


def _convnext(blocks: Sequence[int]) -> list[Named]:
    named: list[Named] = [("features.0.0", "stagestem_conv0")]
    named += [(f"features.{2 * stage + 2}.1", f"stage{stage}_layerds_conv0") for stage in range(len(blocks) - 1)]
    for stage, count in enumerate(blocks):
        for block in range(count):
            module, prefix = f"features.{2 * stage + 1}.{block}.block", f"stage{stage}_layer{block}"
            named += [
                (f"{module}.0", f"{prefix}_dwconv0"),
                (f"{module}.3", f"{prefix}_pwconv1"),
                (f"{module}.5", f"{prefix}_pwconv2"),
            ]
    return named
