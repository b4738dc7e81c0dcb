"""Blocks, names, connections, and that the result is an ordinary module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from kw_lightning.builder import build
from kw_lightning.keras import Network, read_network
from kw_lightning.nn import KWLayer, warehouses
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

RESIDUAL = {
    "parameters": {"filters": None, "strides": 1},
    "layers": [
        {"Conv2D": {"name": "conv_a", "filters": "$filters", "kernel_size": 3, "strides": "$strides", "padding": "same",
                    "use_bias": False, "warehouse": "$warehouse"}},
        "BatchNormalization",
        {"ReLU": None},
        {"Conv2D": {"name": "conv_b", "filters": "$filters", "kernel_size": 3, "padding": "same",
                    "activation": "tanh", "warehouse": "$warehouse"}},
        {"Conv2D": {"name": "shortcut", "inputs": "input", "filters": "$filters", "kernel_size": 1,
                    "strides": "$strides"}},
        {"Add": {"inputs": ["shortcut", "conv_b"]}},
    ],
}  # fmt: skip
EXAMPLE: dict[str, Any] = {
    "kw": 1,
    "model": {
        "input": [1, 8, 8],
        "blocks": {
            "residual": RESIDUAL,
            "stage": {
                "parameters": {"filters": None, "depth": 1},
                "layers": [
                    {"residual": {"name": "down", "filters": "$filters", "strides": 2, "warehouse": "$warehouse"}},
                    {
                        "residual": {
                            "name": "rest",
                            "filters": "$filters",
                            "repeat": "$depth",
                            "warehouse": "$warehouse",
                        }
                    },
                ],
            },
        },
        "layers": [
            {"Conv2D": {"filters": 8, "kernel_size": 3, "padding": "same", "warehouse": "stem"}},
            {"residual": {"name": "stage1", "filters": 8, "warehouse": "stage1", "repeat": 2}},
            {"stage": {"name": "stage2", "filters": 16, "depth": 2, "warehouse": "stage2"}},
            "GlobalAveragePooling2D",
            {"Dense": {"units": 10}},
        ],
    },
    "warehouses": {"stem": {}, "stage1": {}, "stage2": {"budget": "1/2"}},
}


def network_of(layers: list[Any], shape: tuple[int, ...] = (4, 8, 8), **blocks: Any) -> Network:
    """Read a network without warehouses."""
    return read_network(load_recipe({"kw": 1, "model": {"input": list(shape), "blocks": blocks, "layers": layers}}))


def example() -> Network:
    """Read the example."""
    return read_network(load_recipe(EXAMPLE))


def test_names_and_warehouses() -> None:
    network = example()
    model = network.build()
    assert isinstance(model.get_submodule("stage1.0.conv_a"), nn.Conv2d)
    assert isinstance(model.get_submodule("stage2.rest.1.conv_b_activation"), nn.Tanh)
    assert "stage2.down.conv_a_pad" in dict(model.named_modules())  # "same" with strides is not alike on both sides
    assert "stage1.0.conv_a_pad" not in dict(model.named_modules())
    assert {"conv2d.weight", "stage1.1.batch_normalization.running_mean", "dense.bias"} <= set(model.state_dict())
    assert network.warehouses["stem"] == ("conv2d",)
    assert network.warehouses["stage1"] == tuple(f"stage1.{i}.conv_{x}" for i in (0, 1) for x in "ab")
    assert network.warehouses["stage2"][0] == "stage2.down.conv_a"
    assert len(network.warehouses["stage2"]) == 6


def test_a_graph_computes_what_it_says() -> None:
    model = network_of(
        [
            {"Conv2D": {"name": "a", "filters": 4, "kernel_size": 3, "padding": "same"}},
            {"ReLU": {"name": "b"}},
            {"Multiply": {"name": "c", "inputs": ["late", "b"]}},
            {"Conv2D": {"name": "late", "inputs": "a", "filters": 4, "kernel_size": 1}},
            {"Subtract": {"inputs": ["c", "input"]}},
        ]
    ).build()
    x = torch.randn(3, 4, 8, 8)
    a = model.get_submodule("a")(x)
    expected = model.get_submodule("late")(a) * a.relu() - x
    assert torch.equal(model(x), expected)


def test_block_with_two_inputs() -> None:
    mix = {"inputs": ["main", "side"], "layers": [{"Subtract": {"inputs": ["side", "main"]}}, "ReLU"]}
    model = network_of(
        ["Flatten", {"Dense": {"name": "d", "units": 256}}, {"mix": {"inputs": ["flatten", "d"]}}], mix=mix
    )
    built, x = model.build(), torch.randn(2, 4, 8, 8)
    flat = x.flatten(1)
    assert torch.equal(built(x), (built.get_submodule("d")(flat) - flat).relu())


def test_repeated_layers_follow_each_other() -> None:
    layers = [{"Conv2D": {"name": "c", "filters": 4, "kernel_size": 3, "activation": "relu", "repeat": 3}}]
    network = network_of(layers)
    model = network.build()
    assert network.output_shape == (4, 2, 2)
    assert [name for name, _ in model.get_submodule("c").named_children()] == [
        "0", "0_activation", "1", "1_activation", "2", "2_activation",
    ]  # fmt: skip
    assert model(torch.randn(1, 4, 8, 8)).min() >= 0


def test_default_names_are_those_of_keras() -> None:
    network = network_of(["ReLU", "ReLU", "BatchNormalization", "GlobalAveragePooling2D", {"Dense": {"units": 3}}])
    assert [row.name for row in network.summary()[1:]] == [
        "re_lu", "re_lu_1", "batch_normalization", "global_average_pooling2d", "dense",
    ]  # fmt: skip


def test_a_layer_may_have_the_name_of_another_ones_part() -> None:
    layers = [
        {"Conv2D": {"name": "c", "filters": 4, "kernel_size": 1, "activation": "tanh"}},
        {"ReLU": {"name": "c_activation"}},
    ]
    model, x = network_of(layers).build(), torch.randn(2, 4, 3, 3)
    assert list(dict(model.named_children())) == ["c", "c_activation_", "c_activation"]
    assert torch.equal(model(x), model.get_submodule("c")(x).tanh().relu())


def test_the_summary_has_shapes_parameters_connections_and_warehouses() -> None:
    rows = {row.name: row for row in example().summary()}
    assert rows["input"].output_shape == (1, 8, 8)
    assert rows["conv2d"] == ("conv2d", "Conv2D", (8, 8, 8), 80, ("input",), "stem")
    assert rows["stage1.0.conv_a"].connected_to == ("conv2d",)
    assert rows["stage1.1.conv_a"].connected_to == ("stage1.0.add",)
    assert rows["stage2.down.add"].connected_to == ("stage2.down.shortcut", "stage2.down.conv_b")
    assert rows["stage2.down.add"].output_shape == (16, 4, 4)
    assert rows["global_average_pooling2d"].connected_to == ("stage2.rest.1.add",)
    model = example().build()
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_without_declared_warehouses_the_network_is_static() -> None:
    data = {key: value for key, value in EXAMPLE.items() if key != "warehouses"}
    network = read_network(load_recipe(data))
    assert not network.warehouses
    assert all(row.warehouse == "" for row in network.summary())


@pytest.mark.parametrize("dynamic", [False, True])
def test_pickle_deepcopy_and_state_dict(dynamic: bool) -> None:
    model = (build(load_recipe(EXAMPLE)) if dynamic else example().build()).eval()
    x = torch.randn(2, 1, 8, 8)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
    fresh = (build(load_recipe(EXAMPLE)) if dynamic else example().build()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_dynamic_network_has_its_warehouses() -> None:
    model = build(load_recipe(EXAMPLE))
    assert list(warehouses(model)) == ["stem", "stage1", "stage2"]
    assert isinstance(model.get_submodule("stage1.0.conv_a"), KWLayer)
    planned = plan(load_recipe(EXAMPLE))
    assert planned.parameters.kw == sum(p.numel() for p in model.parameters())


def test_warehouses_of_projections_are_found_by_their_submodules() -> None:
    recipe = load_recipe(
        {
            "kw": 1,
            "model": {
                "input": [6, 16],
                "layers": [
                    {"MultiHeadAttention": {"name": "mha", "num_heads": 2, "key_dim": 8, "warehouse": "w"}},
                    {"Reshape": {"target_shape": [16, 2, 3]}},
                    {"SeparableConv2D": {"name": "s", "filters": 16, "kernel_size": 1, "warehouse": "p",
                                         "depthwise_warehouse": "d"}},
                ],
            },
            "warehouses": {"w": {}, "p": {}, "d": {}},
        }
    )  # fmt: skip
    assert read_network(recipe).warehouses == {"w": ("mha.value",), "p": ("s.pointwise",), "d": ("s.depthwise",)}
    model = build(recipe)
    dynamic = [name for name, module in model.named_modules() if isinstance(module, KWLayer)]
    assert dynamic == ["mha.value", "s.depthwise", "s.pointwise"]
    assert model(torch.randn(3, 6, 16)).shape == (3, 16, 2, 3)


def test_a_network_compiles_to_one_graph() -> None:
    model = example().build().eval()
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_export_for_any_batch() -> None:
    model = example().build().eval()
    exported = torch.export.export(
        model, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    x = torch.randn(5, 1, 8, 8)
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


def test_training_reaches_every_parameter() -> None:
    model = example().build()
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_values_are_released_after_their_last_use() -> None:
    model = network_of(["ReLU", {"ReLU": {"name": "kept"}}, "ReLU", {"Add": {"inputs": ["kept", "re_lu_1"]}}]).build()
    released = [step.release for step in model._steps]  # type: ignore[union-attr]
    assert released == [("input",), ("re_lu",), (), ("kept", "re_lu_1")]


def test_backbone_followed_by_layers() -> None:
    pytest.importorskip("timm")
    recipe = load_recipe(
        {
            "kw": 1,
            "model": {
                "backbone": "timm/resnet18",
                "args": {"num_classes": 0, "global_pool": ""},
                "input": [3, 64, 64],
                "layers": [
                    {
                        "Conv2D": {
                            "name": "neck",
                            "filters": 32,
                            "kernel_size": 3,
                            "padding": "same",
                            "warehouse": "neck",
                        }
                    },
                    "GlobalMaxPooling2D",
                    {"Dense": {"units": 5}},
                ],
            },
            "warehouses": {"neck": {}, "last": {"layers": ["backbone.layer4.1.conv?"]}},
        }
    )
    network = read_network(recipe)
    assert network.summary()[1][:3] == ("backbone", "timm/resnet18", (512, 2, 2))
    model = build(recipe)
    assert isinstance(model.get_submodule("backbone.layer4.1.conv1"), KWLayer)
    assert isinstance(model.get_submodule("neck"), KWLayer)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_start_values_are_those_of_keras() -> None:
    torch.manual_seed(0)
    model = network_of(
        [{"Conv2D": {"name": "c", "filters": 64, "kernel_size": 3}}, "Flatten", {"Dense": {"units": 500}}]
    ).build()
    conv, dense = model.get_submodule("c"), model.get_submodule("dense")
    for weight, fans in ((conv.weight, 9 * (4 + 64)), (dense.weight, 64 * 36 + 500)):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert abs(float(weight.detach().std()) - bound / 3**0.5) < 0.05 * bound
    assert not conv.bias.any()
    assert not dense.bias.any()
