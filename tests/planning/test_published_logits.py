"""Whole networks of the zoo against the published implementation's logits, in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from published import PUBLISHED, our_key, our_name, recipe_name, recorded_value

from kw_lightning.builder import build
from kw_lightning.nn import KWLayer, set_temperature
from kw_lightning.recipe import load_recipe


@pytest.mark.parametrize("recorded", sorted(path.stem for path in PUBLISHED.glob("*.npz")))
def test_a_published_network_gives_the_published_logits(recorded: str) -> None:
    published = json.loads((PUBLISHED / f"{recorded}.json").read_text())
    archive = np.load(PUBLISHED / f"{recorded}.npz")  # the logits, and the published keys and shapes
    with torch.device("meta"):
        model = build(load_recipe(recipe_name(recorded)))
    model = model.to_empty(device="cpu").double().eval()
    layers = {layer["name"]: layer["warehouse"] for layer in published["layers"]}
    dynamic = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    assert dynamic
    assert dynamic.keys() <= {our_name(published_name) for published_name in layers}
    left = dict(model.state_dict())
    with torch.no_grad():
        for key, shape in json.loads(str(archive["state"])).items():
            value = recorded_value(key, shape)
            if key.startswith("warehouse_manager.weights."):
                index = int(key.rpartition(".")[2])
                first = next(name for name, warehouse in layers.items() if warehouse == index)
                cells = dynamic[our_name(first)].warehouse.cells
                cells.copy_(value.reshape(cells.shape))
                left = {k: v for k, v in left.items() if v.data_ptr() != cells.data_ptr()}
            else:
                target = left.pop(our_key(key, set(layers)))
                target.copy_(value.reshape(target.shape))
    assert {key.rpartition(".")[2] for key in left} == {"temperature"}
    x = torch.as_tensor(np.random.RandomState(3).standard_normal((2, 3, 96, 96)))
    for temperature in (0.0, 0.5):
        set_temperature(model, temperature)
        with torch.no_grad():
            logits = model(x)
        expected = torch.as_tensor(archive[f"logits_tau{temperature}"])
        assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
