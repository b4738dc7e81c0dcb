"""The engine as an operator: derivatives, compilation, transforms, autocast, what is kept for the backward pass."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from kw_lightning.nn import KWConv2d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import Convolution, dynamic_convolution, operators, reference
from kw_lightning.nn.weighing import Function

GEOMETRY = Convolution((4, 4, 3, 3), (2, 4, 1, 1), (1, 1), (1, 1), (1, 1))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]
SHAPES = ((2, 4, 5, 5), (2, 18, 3), (3, 2, 4, 1, 1))


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


def convolve(x: Tensor, attention: Tensor, cells: Tensor) -> Tensor:
    return dynamic_convolution(x, attention, cells, GEOMETRY)


def literal(x: Tensor, attention: Tensor, cells: Tensor) -> Tensor:
    return reference.convolve(x, attention, cells, GEOMETRY)


def network(function: Function = "contrast") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [KWConv2d(8, 16, 3, padding=1), KWConv2d(16, 16, 3, stride=2, padding=1)]
    share_warehouse(layers, function=function)
    linear = KWLinear(16, 8)
    share_warehouse([linear], name="linear")
    net = nn.Sequential(*layers, nn.Flatten(2), _Transpose(), linear)
    set_temperature(net, 0.5)
    return net


class _Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_first_and_second_derivatives() -> None:
    assert torch.autograd.gradcheck(convolve, tensors())
    assert torch.autograd.gradgradcheck(convolve, tensors())


def test_a_penalty_on_gradients_equals_the_literal_forms() -> None:
    found, expected = [], []
    for function, place in ((convolve, found), (literal, expected)):
        values = tensors()
        (gradient,) = torch.autograd.grad(function(*values).sin().sum(), values[0], create_graph=True)
        place += torch.autograd.grad(gradient.square().sum(), values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", ["contrast", "softmax"])
def test_a_penalty_on_gradients_of_a_network_equals_the_literal_forms(function: Function) -> None:
    net, found = network(function).eval(), []  # α is made of x, and the second layer's x of the cells that it shares
    x = torch.randn(3, 8, 6, 6)
    for engine in ("auto", "reference"):
        for layer in net.modules():
            if isinstance(layer, KWLayer):
                layer.engine = engine
        images = x.clone().requires_grad_()
        values = [images, *net.parameters()]
        gradients = torch.autograd.grad(net(images).sin().sum(), values, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        second = torch.autograd.grad(penalty, values, allow_unused=True, materialize_grads=True)
        found.append([*gradients, *second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.detach().abs().max().clamp_min(1.0)))


class _Image(Tensor):
    """A tensor with a method of its own, as MONAI's have."""

    def new_empty(self, size: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).new_empty(size=size, **options)  # no single number


@pytest.mark.parametrize("function", ["contrast", "softmax"])
def test_tensors_of_an_own_class_are_computed_with_as_any_others(function: Function) -> None:
    net, x = network(function).eval(), torch.randn(3, 8, 6, 6)
    expected = net(x)
    y = net(x.as_subclass(_Image))
    assert type(y) is _Image
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    with torch.inference_mode():
        torch.testing.assert_close(net(x.as_subclass(_Image)).as_subclass(Tensor), expected)
    y.sin().sum().backward()
    found = [parameter.grad for parameter in net.parameters()]
    assert {type(gradient) for gradient in found} == {Tensor}
    for one, other in zip(found, torch.autograd.grad(expected.sin().sum(), net.parameters()), strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max().clamp_min(1.0)


def test_operator_keeps_pytorchs_rules() -> None:
    arguments = (*tensors(torch.float32), GEOMETRY.numbers, "auto")
    results = torch.library.opcheck(operators.dynamic_convolution, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    net = network()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        x = torch.randn(batch, 8, 6, 6)
        net.zero_grad()
        expected = net(x)
        expected.square().sum().backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            # Relative to the largest: a gradient that is a small rest of large sums has its roundings from those.
            assert (parameter.grad - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp_min(1.0)


def test_an_exported_graph_gives_the_same_output() -> None:
    net = network().eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_transforms_of_functions() -> None:
    values = tensors()
    found = torch.func.grad(lambda *a: convolve(*a).sin().sum(), argnums=(0, 1, 2))(*values)
    expected = torch.autograd.grad(literal(*values).sin().sum(), values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    tangents = tuple(torch.randn_like(value) for value in values)
    torch.testing.assert_close(
        torch.func.jvp(convolve, tuple(values), tangents), torch.func.jvp(literal, tuple(values), tangents)
    )
    x, attention, cells = values
    per_sample = torch.func.vmap(
        torch.func.grad(lambda cells, x, attention: convolve(x[None], attention[None], cells).sin().sum()),
        in_dims=(None, 0, 0),
    )(cells, x, attention)
    assert per_sample.shape == (2, *cells.shape)
    torch.testing.assert_close(per_sample.sum(0), expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_and_keeps_gradients_whole(dtype: torch.dtype) -> None:
    net = network()
    x = torch.randn(3, 8, 6, 6)
    expected = net(x)
    with torch.autocast("cpu", dtype):
        y = net(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


def test_deterministic_mode_gives_the_same_bits_twice() -> None:
    results: list[Any] = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            values = tensors(torch.float32)
            y = convolve(*values)
            results.append([y, *torch.autograd.grad(y.sin().sum(), values)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_only_input_attention_and_cells_are_kept() -> None:
    values = tensors()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        convolve(*values)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted(tensor.data_ptr() for tensor in values)


def test_forward_mode_gives_the_literal_forms_tangent() -> None:
    values = [value.detach() for value in tensors()]
    with forward_ad.dual_level():
        values[0] = forward_ad.make_dual(values[0], torch.ones_like(values[0]))
        found, expected = (forward_ad.unpack_dual(function(*values)).tangent for function in (convolve, literal))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0


def test_a_network_turns_channels_last() -> None:
    net = network()
    x = torch.randn(3, 8, 6, 6)
    expected = net(x)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    assert net[0](x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match='found the unknown engine "fast", allowed: auto, '):
        dynamic_convolution(*tensors(), GEOMETRY, "fast")


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, and all gradients of its mean square as one vector, in float64 on the CPU."""
    net.zero_grad()
    y = net(x)
    with torch.autocast(x.device.type, enabled=False):
        y.to(torch.promote_types(y.dtype, torch.float32)).square().mean().backward()
    gradients = torch.cat([parameter.grad.double().flatten().cpu() for parameter in net.parameters()])
    return [y.detach().double().cpu(), gradients]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_as_exact_as_its_type(dtype: torch.dtype, device: str) -> None:
    """Outputs to a few roundings; gradients to about √eps, in the middle of several inputs.

    A rounding of eps takes a share of about eps of all hidden activations and of all z across 0, where the gradients
    of ReLU and |z| jump by all of it: squares of errors add up to eps. The literal form misses by as much.
    """
    net = network()
    for name, parameter in net.named_parameters():
        if name.endswith("expand.bias"):  # else samples without a hidden activation have no z: α jumps by 1/0.001
            nn.init.normal_(parameter)
    exact = copy.deepcopy(net).double()
    net.to(device)
    eps = torch.finfo(dtype).eps
    misses = []
    for turn in range(7):
        x = torch.randn(4, 8, 12, 12)
        given = x.to(device, memory_format=torch.channels_last if turn % 2 else torch.contiguous_format)
        with torch.autocast(device, dtype):
            found = step(net, given)
        pairs = zip(found, step(exact, x.double()), strict=True)
        of_y, of_gradients = (float((one - other).norm() / other.norm()) for one, other in pairs)
        assert of_y < 4 * eps
        misses.append(of_gradients)
    assert statistics.median(misses) < eps**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_under_autocast_waits_for_nothing(dtype: torch.dtype) -> None:
    net = network().cuda()
    x = torch.randn(4, 8, 12, 12, device="cuda")
    net(x).sum().backward()  # what is made once
    net.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype):
            y = net(x)
        y.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_in_cuda_graphs_are_those_without() -> None:
    net = network().cuda()
    compiled = torch.compile(copy.deepcopy(net), mode="reduce-overhead", fullgraph=True)
    skipped = counters["inductor"]["cudagraph_skips"]
    for turn in range(4):  # the first ones are recorded
        set_temperature(net, 0.5 - turn / 10)
        set_temperature(compiled, 0.5 - turn / 10)
        x = torch.randn(4, 8, 12, 12).to("cuda", memory_format=torch.channels_last)
        for found, expected in zip(step(compiled, x), step(net, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == skipped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiles_by_inductor_on_a_gpu_and_is_deterministic() -> None:
    net = network().cuda()
    x = torch.randn(4, 8, 12, 12, device="cuda")
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = []
        for _ in range(2):
            net.zero_grad()
            net(x).square().mean().backward()
            results.append([parameter.grad.clone() for parameter in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
