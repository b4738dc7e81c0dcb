"""What the paper varied, as keys of a recipe: from the text to the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kw_lightning import convert
from kw_lightning.builder import build
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.export.static import fold, needs_samples, with_learnt_kernels
from kw_lightning.inference.saving import SavedNetwork
from kw_lightning.nn import KWConv2d, KWLayer, set_temperature
from kw_lightning.planning import Plan, plan
from kw_lightning.preprocessing import Preprocessing
from kw_lightning.published import published_entries
from kw_lightning.recipe import load_recipe
from kw_lightning.report.attention import DetailedMetric

X = torch.randn(4, 8, 6, 6)


def static() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))


def written(attention: dict[str, Any] | None = None, **warehouse: Any) -> dict[str, Any]:
    """Return a recipe as plain data, whose two convolutions share a warehouse."""
    given = {"layers": ["0", "2"], "attention": attention or {}, **warehouse}
    return {"kw": 1, "name": "family", "warehouses": {"a": given}}


def planned(attention: dict[str, Any] | None = None, **warehouse: Any) -> Plan:
    return plan(load_recipe(written(attention, **warehouse)), static(), input_shape=[8, 6, 6])


def made(attention: dict[str, Any] | None = None, **warehouse: Any) -> nn.Sequential:
    """Return the network of a recipe, as it is made."""
    converted = convert(static(), written(attention, **warehouse))
    assert isinstance(converted, nn.Sequential)
    return converted


def first(network: nn.Sequential) -> KWConv2d:
    layer = network[0]
    assert isinstance(layer, KWConv2d)
    return layer


def test_a_recipe_says_what_mixtures_start_as() -> None:
    own, shared, none = (first(made({"start": start}, budget="1/2")) for start in ("own", "shared", "none"))
    assert own.partition is not None
    assert shared.partition is not None
    assert shared.attention is not None
    assert none.attention is not None
    assert own.partition.cells in own.partition.initial_cells
    assert own.partition.cells not in shared.partition.initial_cells
    assert shared.attention.annealed
    assert not none.attention.annealed


def check_counts(found: Plan, network: nn.Module) -> None:
    """Check that the plan counts the parameters that the network has."""
    assert found.parameters.kw == sum(parameter.numel() for parameter in network.parameters())


def test_pure_sharing_counts_and_computes_as_a_static_network() -> None:
    found, network = planned(dynamic=False), made(dynamic=False).eval()
    check_counts(found, network)
    assert found.macs is not None
    assert found.macs.kw == found.macs.static
    assert found.warehouses[0].attention_parameters == 27 * 28
    set_temperature(network, 0.25)
    assert {name for name, _ in network.named_parameters() if "attention" in name} == {
        "0.attention.z",
        "2.attention.z",
    }
    alone = with_learnt_kernels(network)
    assert not any(isinstance(module, KWLayer) for module in alone.modules())
    torch.testing.assert_close(alone(X), network(X), rtol=1e-4, atol=1e-6)
    assert with_learnt_kernels(alone) is alone


def test_pure_sharing_is_folded_without_a_sample() -> None:
    network = made(dynamic=False)
    set_temperature(network, 0.25)
    assert not needs_samples(network)
    assert needs_samples(made())
    saved = SavedNetwork(network, load_recipe(written(dynamic=False)), Preprocessing(), ())
    torch.testing.assert_close(fold(saved, ()).network(X), network(X), rtol=1e-4, atol=1e-6)


def test_pure_sharing_takes_any_engine_and_no_place_in_the_authors_layout() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    data = {"kw": 1, "engine": "mix_outputs", "warehouses": {"a": {"layers": ["0"], "dynamic": False}}}
    converted = convert(grouped, data)
    with pytest.raises(RunError, match='no place for the attention of "0": LearntWeights'):
        published_entries(converted, "torchvision/resnet18")
    with pytest.raises(RecipeError, match="which cannot compute"):
        convert(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), {**data, "warehouses": {"a": {"layers": ["0"]}}})


def test_pure_sharing_can_be_the_default_of_warehouses_and_stages() -> None:
    recipe = load_recipe({**written(), "defaults": {"dynamic": False}, "stages": "auto"})
    assert recipe.stages is not None
    assert not recipe.stages.dynamic
    assert not recipe.warehouses[0].dynamic
    assert load_recipe({**written(dynamic=True), "defaults": {"dynamic": False}}).warehouses[0].dynamic


@pytest.mark.parametrize("function", ["contrast", "softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_recipe_says_how_cells_are_weighed(function: str, dynamic: bool) -> None:
    attention = (
        {"function": function, "softmax_temperature": {"start": 20}}
        if function == "softmax"
        else {"function": function}
    )
    found, network = planned(attention, dynamic=dynamic), made(attention, dynamic=dynamic)
    check_counts(found, network)
    layer = first(network)
    assert layer.warehouse is not None
    assert layer.attention is not None
    assert layer.attention.function == function
    assert ("0.warehouse.softmax_temperature" in network.state_dict()) == (function == "softmax")
    again = made(attention, dynamic=dynamic)
    again.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(X), again.eval()(X))


def test_a_temperature_of_no_softmax_is_refused() -> None:
    annealing = {"softmax_temperature": {"epochs": 5}}
    with pytest.raises(RecipeError, match=r"a\.attention\.softmax_temperature: .* allowed: function: softmax"):
        load_recipe(written(annealing))
    with pytest.raises(RecipeError, match=r"defaults\.attention\.softmax_temperature"):
        load_recipe({**written(), "defaults": {"attention": annealing}})
    recipe = load_recipe({**written({"function": "softmax"}), "defaults": {"attention": annealing}})
    assert recipe.warehouses[0].attention.softmax_temperature is not None


def test_a_warm_start_that_needs_weights_of_either_sign_is_refused_with_the_way_out() -> None:
    for attention, budget in (({"function": "relu"}, "1/2"), ({"function": "sigmoid", "start": "none"}, 1)):
        with pytest.raises(RecipeError, match=r"a\.attention\.function: .* contrast, or temperature\.start: 1"):
            convert(static(), written(attention, budget=budget), warm_start=True)
    old = static()
    network = convert(static(), written({"function": "relu"}), warm_start=True).eval()
    torch.testing.assert_close(network(X), old(X), rtol=1e-4, atol=1e-5)


def test_gates_count_fold_and_need_dynamics() -> None:
    attention = {"gates": ["input", "output"]}
    found, network = planned(attention), made(attention).eval()
    check_counts(found, network)
    bare = planned()
    assert found.macs is not None
    assert bare.macs is not None
    assert found.macs.kw - bare.macs.kw == 16 * (8 + 16 + 16 + 16)
    set_temperature(network, 0.25)
    saved = SavedNetwork(network, load_recipe(written(attention)), Preprocessing(), ())
    alone = fold(saved, [X[:1]]).network
    torch.testing.assert_close(alone(X[:1]), network(X[:1]), rtol=1e-3, atol=1e-5)
    with pytest.raises(RecipeError, match=r"\.a: found attention\.gates with dynamic: false, allowed: either"):
        planned(attention, dynamic=False)
    with pytest.raises(RunError, match="no place for the attention"):
        published_entries(network, "torchvision/resnet18")
    with pytest.raises(RecipeError, match=r'gates\[0\]: found "inputs", allowed: input, output; did you mean "input"'):
        load_recipe(written({"gates": ["inputs"]}))


def test_statistics_count_weights_that_no_sample_changes_for_every_image() -> None:
    alpha, targets = torch.randn(1, 3, 4), torch.tensor([0, 1, 1])
    learnt, dynamic = DetailedMetric([3], 4), DetailedMetric([3], 4)
    learnt.update(0, alpha, targets)
    dynamic.update(0, alpha.expand(3, -1, -1), targets)
    assert learnt.class_use is not None
    assert dynamic.class_use is not None
    torch.testing.assert_close(learnt.class_use, dynamic.class_use)


def test_stages_serve_a_network_of_layers_whose_own_warehouses_were_taken_away() -> None:
    layers = [{"Conv2D": {"filters": 8, "kernel_size": 3, "warehouse": "own"}} for _ in range(3)]
    model = {"input": [8, 9, 9], "layers": [*layers, "GlobalAveragePooling2D"]}
    network = build(load_recipe({"kw": 1, "model": model, "stages": {"sharing": "network", "dynamic": False}}))
    assert sum(isinstance(module, KWLayer) for module in network.modules()) == 2
    named = build(load_recipe({"kw": 1, "model": model, "warehouses": {"own": {}}}))
    assert sum(isinstance(module, KWLayer) for module in named.modules()) == 3
