"""Every recorded layer case of the published implementation: attention, output and gradients."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kw_lightning.nn import KWConv1d, KWConv2d, KWLayer, KWLinear, set_temperature, share_warehouse

SHIPPED = Path(__file__).parents[1] / "data" / "reference"
FOLDER = Path(os.environ.get("KW_REFERENCE", SHIPPED))  # a folder with more and larger cases, on demand only
CASES = json.loads((FOLDER / "layers.json").read_text())
TYPES = {"conv1d": KWConv1d, "conv2d": KWConv2d, "linear": KWLinear}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def build(case: dict[str, Any], archive: Any, dtype: torch.dtype) -> nn.ModuleList:
    """Make a case's layers and give them the recorded state."""
    layers: list[KWLayer] = []
    for spec in case["layers"]:
        if spec["type"] == "linear":
            layer: KWLayer = KWLinear(spec["in_channels"], spec["out_channels"], bias=spec["bias"], dtype=dtype)
        else:
            names = (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "groups",
                "bias",
            )
            layer = TYPES[spec["type"]](**{name: spec[name] for name in names}, dtype=dtype)
        layers.append(layer)
    manager = case["manager"]
    for index, warehouse in enumerate(case["warehouses"]):

        def setting(name: str, default: Any, index: int = index) -> Any:
            value = manager.get(name, default)
            return value[index] if isinstance(value, list) else value

        basis = setting("nonlocal_basis_ratio", 1)
        users = [layers[i] for i, spec in enumerate(case["layers"]) if spec["warehouse"] == warehouse["name"]]
        shared = share_warehouse(
            users,
            name=warehouse["name"],
            budget=setting("cell_num_ratio", 1),
            out_ratio=setting("cell_outplane_ratio", 1),
            in_ratio=setting("cell_inplane_ratio", 1),
            spatial="split" if setting("spatial_partition", True) else "whole",
            reduction=setting("reduction", 0.0625),
            norm="layer" if manager.get("norm_layer") == "LayerNorm" else "batch",
            basis=basis if basis < 1 else None,
            dtype=dtype,
        )
        with torch.no_grad():
            recorded = torch.from_numpy(archive[f"state/warehouse_manager.weights.{index}"])
            shared.cells.copy_(recorded.reshape(shared.cells.shape))
    for index, layer in enumerate(layers):
        load_state(layer, archive, f"state/layers.{index}." + ("conv." if isinstance(layer, KWLinear) else ""))
    return nn.ModuleList(layers)


def load_state(layer: KWLayer, archive: Any, prefix: str) -> None:
    names = {"fc1": "reduce", "norm1": "norm", "fc2": "expand", "fc3": "basis"}
    attention = layer.attention
    assert attention is not None
    targets = dict(attention.named_parameters()) | dict(attention.named_buffers())
    for key in archive.files:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name == "bias":
            target = layer.bias
        elif name == "attention.basis_bias":
            target = attention.basis_bias
        else:
            _, module, parameter = name.split(".")
            target = targets[f"{names[module]}.{parameter}"]
        assert target is not None
        with torch.no_grad():
            target.copy_(torch.from_numpy(archive[key]).reshape(target.shape))


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    wanted = torch.from_numpy(expected).reshape(found.shape)
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_case_is_reproduced(case: dict[str, Any], dtype: torch.dtype) -> None:
    archive = np.load(FOLDER / f"{case['name']}.npz")
    limit = TOLERANCE[dtype]
    compared = 0
    for mode in ("eval", "train"):
        for temperature in (0.0, 0.35, 1.0):
            layers = build(case, archive, dtype).train(mode == "train")
            set_temperature(layers, temperature)
            for index, layer in enumerate(layers):
                prefix = f"layer{index}/{mode}/tau{temperature}/"
                x = torch.from_numpy(archive[f"layer{index}/x"]).to(dtype).requires_grad_()
                y = layer(x)
                assert error(y, archive[prefix + "y"]) < limit, prefix + "y"
                compared += 1
                if prefix + "attention" in archive:
                    layer.eval()
                    assert error(layer.attend(x), archive[prefix + "attention"]) < limit, prefix + "attention"
                    layer.train(mode == "train")
                if prefix + "grad_y" in archive:
                    attention = layer.attention
                    wanted = {
                        "grad_x": x,
                        "grad_cells": layer.warehouse.cells,
                        "grad_fc1": attention.reduce.weight,
                        "grad_fc2": attention.expand.weight,
                    }
                    grads = torch.autograd.grad(
                        y, list(wanted.values()), torch.from_numpy(archive[prefix + "grad_y"]).to(dtype)
                    )
                    for name, gradient in zip(wanted, grads, strict=True):
                        assert error(gradient, archive[prefix + name]) < limit, prefix + name
    assert compared == 6 * len(case["layers"])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_initial_cells_are_reproduced(case: dict[str, Any]) -> None:
    archive = np.load(FOLDER / f"{case['name']}.npz")
    for index, layer in enumerate(build(case, archive, torch.float64)):
        assert list(layer.attention.initial_cells) == archive[f"layer{index}/initial_cell"].tolist()
