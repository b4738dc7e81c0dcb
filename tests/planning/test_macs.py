"""The plan's multiply-adds are those that FLOP counters see in the network that is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops

from kw_lightning.builder import apply_plan, make_static
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("digits-resnet", "auto"),
        ("digits-resnet", "mix_kernels"),
        ("resnet18-kw-1x", "auto"),
        ("mobilenetv2-050-kw-1x", "auto"),
        ("deit-tiny-kw-1x", "auto"),
    ],
)
def test_the_plan_counts_what_lightnings_counter_sees(name: str, engine: str) -> None:
    recipe = replace(load_recipe(name), engine=engine)
    planned = plan(recipe)
    assert planned.macs is not None
    assert planned.input_shape is not None
    with torch.device("meta"):
        network = apply_plan(planned, make_static(recipe)).model.eval()
        x = torch.empty(2, *planned.input_shape)
    forward = measure_flops(network, lambda: network(x))
    assert forward / 4 == pytest.approx(planned.macs.kw, rel=0.01)
    network.train()
    step = measure_flops(network, lambda: network(x), lambda y: y.sum())
    # Both gradients of every product, mixtures made anew; of static networks it is just under 3.
    assert 3 <= step / forward <= 3.6
