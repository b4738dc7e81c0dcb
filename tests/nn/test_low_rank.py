"""The low-rank attention's factors: the same numbers as by α, where that counts less, and never of old weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import bases
from kw_lightning.nn.low_rank import LowRank
from kw_lightning.planning import plan
from kw_lightning.planning.engine import plan_engine
from kw_lightning.recipe import load_recipe


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand over factors whatever it counts."""
    monkeypatch.setattr(LowRank, "counts_less", lambda *_, **__: True)


def make(dtype: torch.dtype = torch.float32, tau: float = 0.3) -> list[KWConv2d]:
    """Return layers before and behind another's own cells in one warehouse, with numbers in every weight."""
    torch.manual_seed(0)
    layers = [KWConv2d(12, 12, 3, padding=1, dtype=dtype) for _ in range(3)]
    share_warehouse(layers, budget=8, basis=1 / 16, dtype=dtype)
    for layer in layers:
        set_temperature(layer, tau)
        nn.init.normal_(layer.attention.basis_bias, std=0.1)
        nn.init.normal_(layer.attention.expand.weight)
    return layers


def outcome(layer: KWConv2d, x: Tensor) -> list[Tensor]:
    """Return a layer's output and the gradients of its input and weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = [*layer.attention.parameters(), layer.warehouse.cells]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


@pytest.mark.parametrize("use", ["always", "never"])
@pytest.mark.parametrize("batch", [2, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_are_those_by_alpha(use, batch, dtype, always) -> None:  # type: ignore[no-untyped-def]
    x, layers = torch.randn(batch, 12, 5, 4, dtype=dtype), make(dtype)
    assert [layer.factors_width(batch) for layer in layers] == [16, 16, 16]
    with bases(use):
        found = [outcome(layer, x) for layer in layers]
    for layer in layers:
        layer.double().engine = "reference"
    for tensors, layer in zip(found, layers, strict=True):
        for one, other in zip(tensors, outcome(layer, x.double()), strict=True):
            scale = other.abs().max().clamp_min(1e-3)
            tolerance = 1e-8 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(one.double() / scale, other / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [0, 1, 33])
def test_evaluation_gives_what_alpha_gives(mode: Callable[[], torch.no_grad], batch: int, always: None) -> None:
    layer, linear = make()[1].eval(), KWLinear(16, 16)
    share_warehouse([KWLinear(16, 16), linear], name="linear", budget=8, basis=1 / 16)
    linear.eval()
    for one, x in ((layer, torch.randn(batch, 12, 5, 4)), (linear, torch.randn(batch, 7, 16))):
        with mode():
            found = [one(x) for _ in range(2)]
            one.engine = "reference"
            expected = one(x)
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def train_the_basis(layer: KWConv2d) -> None:
    layer.attention.basis.weight.data.copy_(2 * layer.attention.basis.weight.data)


def change_own_columns_past_the_version(layer: KWConv2d) -> None:
    layer.attention.expand.weight.data.copy_(-layer.attention.expand.weight.data)


def take_another_basis(layer: KWConv2d) -> None:
    layer.attention.basis.weight = nn.Parameter(layer.attention.basis.weight.flip(0))


def change_the_bias(layer: KWConv2d) -> None:
    with torch.no_grad():
        layer.attention.basis_bias.add_(1)


def load_another_state(layer: KWConv2d) -> None:
    layer.load_state_dict({name: tensor + 0.5 for name, tensor in layer.state_dict().items()})


CHANGES = (
    train_the_basis,
    change_own_columns_past_the_version,
    take_another_basis,
    change_the_bias,
    load_another_state,
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_multiplied_out_is_never_stale(change: Callable[[KWConv2d], None], always: None) -> None:
    layer, x = make()[1].eval(), torch.randn(2, 12, 5, 4)
    with torch.no_grad():
        first = layer(x)
        factors = [layer.attention.factors(layer.attention.hidden(x), layer.warehouse.temperature) for _ in range(2)]
        assert factors[0].weight is factors[1].weight
        change(layer)
        found = layer(x)
        layer.engine = "reference"
        expected = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, first, rtol=1e-3, atol=1e-3)


def test_alpha_is_handed_over_where_its_two_factors_count_less() -> None:
    form = LowRank(cells=1152, own=576, first=0, rank=36, width=16)
    assert form.counts_less(64, 256, along_rank=True, still=False)
    assert not form.counts_less(1, 256, along_rank=True, still=False)
    assert form.counts_less(1, 256, along_rank=True, still=True)
    assert not form.counts_less(0, 256, along_rank=True, still=True)
    # Cells alone are mixed: then the last layer counts, and its factors are few where the hidden layer is wide.
    assert form.counts_less(64, 256, along_rank=False, still=False)
    assert not form._replace(width=128).counts_less(64, 256, along_rank=False, still=True)


def test_a_layer_hands_over_factors_in_evaluation_and_of_large_batches() -> None:
    layers = [KWConv2d(16, 16, 3, padding=1) for _ in range(2)]
    share_warehouse(layers, budget=64, basis=1 / 16)
    layer = layers[1]
    assert (layer.factors_width(1), layer.factors_width(64)) == (None, 16)
    with torch.no_grad():
        assert layer.eval().factors_width(1) == 16
        layer.attention.basis.register_forward_hook(lambda *_: None)
        assert layer.factors_width(1) is None


def test_the_plan_sees_its_rank() -> None:
    network = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    warehouse = {"layers": ["0", "1"], "budget": 64, "attention": {"basis": "1/16", "at_most": 10}}
    recipe = load_recipe({"kw": 1, "name": "net", "warehouses": {"all": warehouse}})
    planned = plan(recipe, network, input_shape=(16, 6, 6))
    for batch, width in ((1, None), (64, 16)):
        (layers,) = plan_engine(planned, batch=batch).layers
        assert layers.problem.width == width
