"""The attention's factors in place of α: the same numbers, less that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.builder import convert
from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import AttentionFactors, Convolution, dynamic_convolution, factored, reference, workspace
from kw_lightning.nn.engine.factors import differentiate_alpha, differentiate_sizes, make_alpha, make_sizes
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

GEOMETRY = Convolution((4, 4, 3, 3), (2, 4, 1, 1), (1, 1), (1, 1), (1, 1))
CELLS, WIDTH, MIXTURES = 5, 3, 18
INITIAL = [(3 * i) % (CELLS + 1) for i in range(MIXTURES)]  # the zero cell among them


class Watching(TorchDispatchMode):
    """Sees every operator, and calls it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def make(batch: int = 2, tau: float = 0.3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return (x, hidden, weight, bias, cells)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, 4, 5, 5),
        (batch, WIDTH),
        (MIXTURES * (CELLS + 1), WIDTH),
        (MIXTURES * (CELLS + 1),),
        (CELLS, 2, 4, 1, 1),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def factors(hidden: Tensor, weight: Tensor, bias: Tensor, tau: float = 0.3) -> AttentionFactors:
    return AttentionFactors(hidden, weight, bias, torch.tensor(tau, dtype=hidden.dtype), torch.tensor(INITIAL))


def convolve(*tensors: Tensor) -> Tensor:
    x, hidden, weight, bias, cells = tensors
    return dynamic_convolution(x, factors(hidden, weight, bias), cells, GEOMETRY)


def literal(*tensors: Tensor) -> Tensor:
    x, hidden, weight, bias, cells = tensors
    return reference.convolve(x, factors(hidden, weight, bias).alpha(), cells, GEOMETRY)


def test_alpha_of_factors_is_that_of_the_layers_attention() -> None:
    layer = KWConv2d(8, 8, 3, padding=1)
    share_warehouse([layer], budget=2)
    layer.double()
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    for tau in (1.0, 0.3, 0.0):
        set_temperature(layer, tau)
        found = layer.attention.factors(layer.attention.hidden(x), layer.warehouse.temperature)
        torch.testing.assert_close(found.alpha(), layer.attend(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(make_alpha(found), layer.attend(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 10**9])
def test_gradients_made_in_chunks_are_autograds(limit: int) -> None:
    _, hidden, weight, bias, _ = make(batch=4)
    made = factors(hidden, weight, bias)
    alpha = made.alpha()
    gradient = torch.randn_like(alpha)
    sizes = torch.linalg.vector_norm(made.z(hidden), ord=1, dim=-1) + 1e-3
    expected = torch.autograd.grad(alpha, (hidden, weight, bias), gradient)
    expected_of_sizes = torch.autograd.grad(sizes, (hidden, weight, bias), gradient[..., 0])
    with workspace(limit), torch.no_grad():
        torch.testing.assert_close(make_sizes(made), sizes)
        for one, other in zip(differentiate_alpha(made, gradient), expected, strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(differentiate_sizes(made, gradient[..., 0]), expected_of_sizes, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_output_and_gradients_are_those_of_the_literal_form(batch: int) -> None:
    tensors = make(batch)
    y, expected = convolve(*tensors), literal(*tensors)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-8)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, tensors, gradient)
    for one, other in zip(found, torch.autograd.grad(expected, tensors, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8)


def test_first_and_second_derivatives() -> None:
    assert torch.autograd.gradcheck(convolve, make(), fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, make(), fast_mode=True)


def test_the_operator_keeps_pytorchs_rules() -> None:
    x, hidden, weight, bias, cells = make(dtype=torch.float32)
    tau, initial = torch.tensor(0.3), torch.tensor(INITIAL)
    arguments = (x, hidden, weight, bias, cells, tau, initial, GEOMETRY.numbers, "auto", False)
    assert set(torch.library.opcheck(factored.factored_convolution, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("needed", [[True] * 5, [False, True, True, True, False]])
def test_gradients_lie_as_compilers_are_told(needed: list[bool]) -> None:
    x, hidden, weight, bias, cells = (tensor.detach() for tensor in make(dtype=torch.float32))
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.t().contiguous().t()
    gradient, tau, initial = torch.randn(2, 4, 5, 5), torch.tensor(0.3), torch.tensor(INITIAL)
    arguments = (x, hidden, weight, bias, cells, tau, initial, GEOMETRY.numbers, "auto")
    with torch.no_grad():
        found = torch.ops.kw_lightning.factored_convolution_backward(gradient, *arguments, needed)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in (gradient, *arguments)]
            told = torch.ops.kw_lightning.factored_convolution_backward(*fake, needed)
    assert [(one.shape, one.stride()) for one in found] == [(one.shape, one.stride()) for one in told]


def test_the_operator_is_called_only_where_something_may_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KWConv2d(8, 8, 3, padding=1)
    share_warehouse([layer])
    calls: list[str] = []
    operator = factored.factored_convolution
    monkeypatch.setattr(
        factored, "factored_convolution", lambda *arguments: (calls.append(""), operator(*arguments))[1]
    )
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    alone = layer.eval()(x)
    alone.sum().backward()
    assert not calls
    with Watching():
        watched = layer(x)
    assert calls
    torch.testing.assert_close(alone, watched, rtol=1e-4, atol=1e-5)


def test_nothing_that_grows_with_batch_and_cells_is_kept() -> None:
    layer = KWConv2d(8, 8, 3, padding=1)
    share_warehouse([layer], budget=64)
    x = torch.randn(4, 8, 6, 6)
    sizes: list[int] = []
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert max(sizes) == x.numel() < 4 * layer.partition.mixtures * layer.partition.cells


def test_what_wants_to_see_alpha_is_given_it() -> None:
    layer, linear = KWConv2d(8, 8, 3, padding=1), KWLinear(8, 8)
    share_warehouse([layer])
    share_warehouse([linear, KWLinear(8, 8)], name="linear", basis=0.5)
    assert linear.attention.has_factors
    nn.utils.parametrizations.weight_norm(linear.attention.basis)
    set_temperature(layer, 0.2)
    x = torch.randn(2, 8, 6, 6)
    seen: list[Tensor] = []
    expected = layer(x)
    with layer.attention.register_forward_hook(lambda _, __, alpha: seen.append(alpha)):
        torch.testing.assert_close(layer(x), expected)
    with layer.attention.expand.register_forward_hook(lambda _, __, z: z + 1):
        moved = layer(x)
    assert seen[0].shape == (2, layer.partition.mixtures, layer.partition.cells)
    assert not torch.allclose(moved, expected, atol=1e-6)
    nn.utils.parametrizations.weight_norm(layer.attention.expand)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.attention.has_factors
    assert not linear.attention.has_factors


def test_a_temperature_set_before_the_backward_pass_does_not_change_it() -> None:
    layer = KWConv2d(8, 8, 3, padding=1)
    share_warehouse([layer])
    set_temperature(layer, 0.5)
    x = torch.randn(2, 8, 6, 6)
    layer(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    y = layer(x)
    set_temperature(layer, 0.1)
    y.sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(("batch", "ranked"), [(1, False), (64, True)])
def test_flop_counters_see_bases_mixed_once_for_a_batch_where_that_is_less(batch: int, ranked: bool) -> None:
    cells, width, kernel = 144, 16, 8 * 8 * 9
    shapes = (batch, 8, 6, 6), (batch, width), (9 * (cells + 1), width), (9 * (cells + 1),), (cells, 8, 8, 1, 1)
    x, hidden, weight, bias, stored = (torch.randn(shape).requires_grad_() for shape in shapes)
    made = AttentionFactors(hidden, weight, bias, torch.zeros(()), torch.zeros(9, dtype=torch.int64))
    geometry = Convolution((8, 8, 3, 3), (8, 8, 1, 1), (1, 1), (1, 1), (1, 1))
    last_linear, products = batch * width * len(bias), kernel * 36 * batch
    with FlopCounterMode(display=False) as forward:
        y = dynamic_convolution(x, made, stored, geometry)
    mixing = (width + 1) * (batch + cells) if ranked else batch * cells
    assert forward.get_total_flops() == 2 * (last_linear + kernel * mixing + products)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    mixing = 3 * mixing
    assert backward.get_total_flops() == 2 * (2 * last_linear + kernel * mixing + 2 * products)


def test_flop_counters_agree_with_the_plan() -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    recipe = load_recipe({"kw": 1, "name": "net", "warehouses": {"all": {"layers": ["0", "2"], "budget": 64}}})
    planned = plan(recipe, network, input_shape=(8, 6, 6))
    convert(network, recipe)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 8, 6, 6))
    assert counter.get_total_flops() == pytest.approx(2 * planned.macs.kw, rel=0.01)
