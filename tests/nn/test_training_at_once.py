"""Layers in training, each step as one call a direction: the same numbers, and only where nobody looks on."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kw_lightning
from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import native, planner, training
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.evaluation import MOST_CALLS

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the directions of the steps that are taken."""
    found: list[str] = []
    for name in ("run", "differentiate"):
        real = getattr(native.Step, name)

        def note(self: native.Step, *arguments: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            found.append(name)
            return real(self, *arguments, **options)

        monkeypatch.setattr(native.Step, name, note)
    return found


def made(layer: KWLayer, *, temperature: float = 0.3, **options: Any) -> Any:
    share_warehouse([layer], budget=options.pop("budget", 2), **options)
    set_temperature(layer, temperature)
    return layer


def dense(**options: Any) -> KWConv2d:
    return made(KWConv2d(16, 32, 3, padding=1), **options)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], Any]] = {
    "dense": dense,
    "winograd": lambda: made(KWConv2d(32, 32, 3, padding=1)),
    "pointwise": lambda: made(KWConv2d(24, 40, 1, bias=False)),
    "pointwise, wide": lambda: made(KWConv2d(64, 64, 1, bias=False)),
    "strided": lambda: made(KWConv2d(16, 16, 3, stride=2, padding=1), temperature=0.0),
    "pointwise, strided": lambda: made(KWConv2d(16, 32, 1, stride=2, bias=False)),
    "reaching over the edge": lambda: made(KWConv2d(16, 16, 3, padding=8, dilation=8)),
    "depthwise": lambda: made(KWConv2d(24, 24, 3, padding=1, groups=24)),
    "in groups": lambda: made(KWConv2d(16, 32, 3, padding=1, groups=4)),
    "one dimension": lambda: made(KWConv1d(16, 24, 3, padding=1)),
    "three dimensions": lambda: made(KWConv3d(16, 16, 3, padding=1)),
    "layer norm": lambda: made(KWConv2d(16, 32, 3, padding=1), norm="layer"),
    "no start": lambda: made(KWConv2d(16, 32, 3, padding=1), start="none"),
    "linear": lambda: made(KWLinear(24, 40)),
    "linear of no tokens": lambda: made(KWLinear(32, 64, bias=False)),
    "linear of tokens in two dimensions": lambda: made(KWLinear(16, 16), norm="layer"),
    "several layers": lambda: share(*(KWConv2d(16, 16, 3, padding=1) for _ in range(3))),
}


def share(*layers: KWConv2d) -> nn.Sequential:
    share_warehouse([*layers], budget=1)
    network = nn.Sequential(*layers)
    set_temperature(network, 0.4)
    return network


def shape_of(name: str, layer: KWLayer, batch: int, side: int) -> tuple[int, ...]:
    """Return the shape of an input."""
    _, channels, *kernel = layer.kernel_shape
    if isinstance(layer, KWLinear):
        return batch, *[side] * (0 if "no tokens" in name else 1 + ("two" in name)), channels
    return batch, channels * getattr(layer, "groups", 1), *[side] * len(kernel)


def literal(network: nn.Module) -> Any:
    """Return a copy that computes the literal form in double precision."""
    twin = copy.deepcopy(network).double()
    for layer in twin.modules():
        if isinstance(layer, KWLayer):
            layer.engine = "reference"
    return twin


def assert_alike(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    near = 2e-4 * float(expected.detach().abs().max()) + 1e-6
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-3, atol=near)


def compare(network: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Compare outputs, all gradients and running statistics of a step."""
    one, other = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()
    y, expected = network(one), twin(other)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient.double())
    assert_alike(y, expected)
    assert_alike(one.grad, other.grad)
    assert one.grad.stride() == one.stride()
    for name, parameter in network.named_parameters():
        assert_alike(parameter.grad, twin.get_parameter(name).grad)
    for name, buffer in network.named_buffers():
        assert_alike(buffer, twin.get_buffer(name))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_gives_the_literal_forms_numbers(
    name: str, count: int, runs: list[str], threads: Callable[[int], None]
) -> None:
    threads(count)
    network = LAYERS[name]()
    layers = [module for module in network.modules() if isinstance(module, KWLayer)]
    # Of many samples' hidden activations behind several layers, one is on the other side of 0 in double precision.
    sizes = ((1, 7), (5, 4), (33, 3)) if len(layers) == 1 else ((1, 7), (5, 4))
    for mode in (True, False):
        network.train(mode)
        for batch, side in sizes:
            x = torch.randn(shape_of(name, layers[0], batch, side)) + 0.3
            for each in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
                if isinstance(layers[0], KWLinear) and not each.is_contiguous():
                    each = x.flip(-1)  # what is to be a map has its channels last
                network.zero_grad()
                compare(network, literal(network), each)
    assert runs.count("run") == runs.count("differentiate") == 4 * len(sizes) * len(layers)


@pytest.mark.parametrize(
    ("make", "budget", "shape"),
    [
        (lambda: KWLinear(192, 192), 108, (1, 197, 192)),
        (lambda: KWConv2d(96, 96, 1), 1, (1, 96, 14, 14)),
        (lambda: KWConv2d(96, 96, 1), 1, (5, 96, 5, 5)),
        (lambda: KWConv2d(64, 64, 3, padding=1), 1, (2, 64, 14, 14)),
        (lambda: KWConv2d(64, 64, 3, padding=1), 1, (2, 64, 2, 2)),
        (lambda: KWConv2d(64, 64, 3, padding=1, groups=64), 1, (2, 64, 9, 9)),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_keeps_to_the_memory_that_it_asked_for(
    make: Callable[[], KWLayer],
    budget: int,
    shape: tuple[int, ...],
    count: int,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lent: list[tuple[int, Tensor]] = []

    def scratch(purpose: str, size: int, like: Tensor) -> Tensor:
        lent.append((size, torch.full((size + 2**16,), 7.0)))
        return lent[-1][1]

    monkeypatch.setattr("kw_lightning.nn.engine.native.training.flat_scratch", scratch)
    threads(count)
    made(make(), budget=budget)(torch.randn(shape)).sum().backward()
    assert len(lent) == 2
    for size, memory in lent:
        assert memory[size:].eq(7).all()


def test_gradients_add_up_over_steps_and_passes(runs: list[str]) -> None:
    network = LAYERS["several layers"]()
    twin = literal(network)
    for _ in range(2):
        compare(network, twin, torch.randn(4, 16, 5, 5))
    x = torch.randn(4, 16, 5, 5)
    for net, images in ((network, x), (twin, x.double())):
        y = net(images).square().mean()
        y.backward(retain_graph=True)
        y.backward()
    for name, parameter in network.named_parameters():
        assert_alike(parameter.grad, twin.get_parameter(name).grad)
    assert len(runs) == 3 * (2 + 2 + 3)


def test_some_gradients_alone_are_those_of_all() -> None:
    network, x = LAYERS["several layers"](), torch.randn(3, 16, 5, 5, requires_grad=True)
    cells = network[0].warehouse.cells
    wanted = [x, *network.parameters()]
    together = torch.autograd.grad(network(x).square().mean(), wanted)
    for tensor, expected in zip(wanted, together, strict=True):
        (found,) = torch.autograd.grad(network(x).square().mean(), tensor)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    network(x.detach()).square().mean().backward()
    (place,) = (index for index, tensor in enumerate(wanted) if tensor is cells)
    torch.testing.assert_close(cells.grad, together[place], rtol=1e-4, atol=1e-6)


def test_second_derivatives_are_the_literal_forms(runs: list[str]) -> None:
    layer = dense()
    twin = literal(layer)
    penalties = []
    x = torch.randn(3, 16, 5, 5)
    for net, images in ((layer, x.requires_grad_()), (twin, x.detach().double().requires_grad_())):
        (gradient,) = torch.autograd.grad(net(images).square().mean(), images, create_graph=True)
        penalties.append(gradient.square().sum())
        penalties[-1].backward()
    assert_alike(*penalties)
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:  # a penalty has none of the bias
            assert_alike(parameter.grad, twin.get_parameter(name).grad)
    assert runs == ["run", "differentiate"]  # the second derivative goes back through the output, too


@pytest.mark.parametrize("engine", ["auto", "mix_outputs"])
def test_many_gradients_at_once_are_those_one_by_one(engine: str, runs: list[str]) -> None:
    layer, x = dense(), torch.randn(3, 16, 5, 5, requires_grad=True)
    layer.engine = engine
    y = layer(x)
    gradients = torch.randn(4, *y.shape)
    (found,) = torch.autograd.grad(y, x, gradients, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(found, gradients, strict=True):
        assert_alike(one, torch.autograd.grad(y, x, gradient, retain_graph=True)[0])
    assert runs == (["run", *["differentiate"] * 4] if engine == "auto" else [])


def test_the_temperature_is_that_of_the_forward_pass() -> None:
    layer, x = dense(temperature=0.7), torch.randn(3, 16, 5, 5)
    twin = literal(layer)
    y, expected = layer(x), twin(x.double())
    set_temperature(layer, 0.1)
    y.sum().backward()
    expected.sum().backward()
    assert_alike(layer.warehouse.cells.grad, twin.warehouse.cells.grad)


def test_a_batch_may_come_between_one_sample_and_its_gradients(runs: list[str]) -> None:
    x = torch.randn(4, 16, 8, 8)
    gradients = []
    for batches in ([], [x]):
        torch.manual_seed(0)
        layer = dense().train()
        y = layer(x[:1])
        for batch in batches:
            layer(batch)
        gradients.append(torch.autograd.grad(y.square().sum(), layer.parameters()))
    assert runs
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_weight_that_was_changed_before_the_backward_pass_is_told_of() -> None:
    layer = dense()
    y = layer(torch.randn(3, 16, 5, 5))
    with torch.no_grad():
        layer.attention.expand.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_made_again_for_its_gradients_has_the_same(runs: list[str]) -> None:
    layer = dense(norm="layer")
    x = torch.randn(3, 16, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().mean(), [x, *layer.parameters()])
    again = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(again.square().mean(), [x, *layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert runs.count("run") == 3


def test_whoever_looks_on_gets_the_operators(runs: list[str]) -> None:
    layer, x = dense(), torch.randn(3, 16, 6, 6)
    attention = layer.attention
    for module in (attention, attention.reduce, attention.norm, attention.expand):
        seen: list[Any] = []
        for register in (module.register_forward_hook, module.register_full_backward_hook):
            handle = register(lambda *_, seen=seen: seen.append(0))
            layer(x.requires_grad_()).sum().backward()
            handle.remove()
        assert len(seen) == 2
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.func.grad(lambda x: layer.eval()(x).sum())(x)
    attention.expand.weight.requires_grad_(False)
    layer(x).sum().backward()
    attention.expand.weight.requires_grad_(True)
    layer.engine = "reference"
    layer(x).sum().backward()
    torch.compile(dense(), backend="eager", fullgraph=True)(x).sum().backward()
    assert runs == []
    layer.engine = "auto"
    layer(x).sum().backward()
    assert runs == ["run", "differentiate"]


@pytest.mark.parametrize("x", [torch.randn(16, 6, 6), torch.randn(0, 16, 6, 6), torch.randn(2, 16, 12, 12)[..., ::2]])
def test_inputs_for_which_there_is_no_step_are_computed_as_ever(x: Tensor, runs: list[str]) -> None:
    layer = dense()
    twin = literal(layer)
    layer(x).sum().backward()
    twin(x.double()).sum().backward()
    assert_alike(layer.attention.expand.weight.grad, twin.attention.expand.weight.grad)
    assert runs == []


def test_inputs_and_engines_that_do_not_fit_are_refused_as_ever() -> None:
    for shape in ((1, 8, 6, 6), (16,), ()):
        with pytest.raises(RuntimeError, match="expected x of"):
            dense()(torch.randn(shape))
    layer = LAYERS["depthwise"]()
    layer.engine = "mix_inputs"
    with pytest.raises(ValueError, match=r'engine "mix_inputs" for a convolution .*allowed'):
        layer(torch.randn(2, 24, 6, 6))


def change_epsilon(layer: KWConv2d) -> None:
    layer.attention.norm.eps = 3.0


def take_steps(layer: KWConv2d) -> None:
    layer.stride = (2, 2)


def swap_weights(layer: KWConv2d) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0).clone()


def turn_a_weight(layer: KWConv2d) -> None:
    weight = layer.attention.reduce.weight
    weight.data = weight.data.flip(1).t().contiguous().t()


def drop_the_bias(layer: KWConv2d) -> None:
    layer.bias = None


def fold_a_norm(layer: KWConv2d) -> None:
    layer.output_scale = torch.rand(32) + 0.5


def stop_counting(layer: KWConv2d) -> None:
    layer.attention.norm.momentum = None


@pytest.mark.parametrize(
    "change", [change_epsilon, take_steps, swap_weights, turn_a_weight, drop_the_bias, fold_a_norm, stop_counting]
)
def test_a_change_counts_at_once(change: Callable[[KWConv2d], None]) -> None:
    layer = dense()
    compare(layer, literal(layer), torch.randn(4, 16, 6, 6))
    change(layer)
    for _ in range(2):
        layer.zero_grad()
        compare(layer, literal(layer), torch.randn(4, 16, 6, 6))


def test_a_path_that_saves_less_than_its_calls_cost_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network = kw_lightning.build(kw_lightning.load_recipe("digits-resnet"))
    layer, x = network.get_submodule("stage2.conv2"), torch.randn(136, 64, 8, 8)
    problem = Problem.of(x, layer.attend(x), layer.warehouse.cells, layer._convolution(), backward=False)
    fastest, *others = planner.survey(problem._replace(width=16), "auto")
    assert fastest.path.of_bases
    assert fastest.seconds + training.CALLING > min(c.seconds for c in others if c.path.name == "mix_kernels/compiled")
    assert layer.call(x) is not None
    monkeypatch.setattr(training, "CALLING", 0.0)
    layer.calls.steps.clear()
    assert layer.call(x) is None


def test_copies_and_pickles_have_steps_of_their_own() -> None:
    layer, x = dense(), torch.randn(4, 16, 6, 6)
    compare(layer, literal(layer), x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            twin.warehouse.cells.mul_(2)
        twin.zero_grad()
        compare(twin, literal(twin), x)


def test_threads_may_train_one_layer_at_once() -> None:
    layer, x = dense().eval(), torch.randn(4, 16, 6, 6)
    twin = literal(layer)
    twin(x.double()).square().mean().backward()
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(layer(x).square().mean(), layer.warehouse.cells)[0])

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 60
    for gradient in found:
        assert_alike(gradient, twin.warehouse.cells.grad)


def test_a_layer_is_let_go_and_keeps_steps_of_a_few_sizes_alone() -> None:
    layer = dense()
    for side in range(3, MOST_CALLS + 6):
        layer(torch.randn(2, 16, side, side)).sum().backward()
    assert 0 < len(layer.calls.steps) <= MOST_CALLS
    cells = weakref.ref(layer.warehouse.cells)
    layer.warehouse.cells = nn.Parameter(layer.warehouse.cells.detach().clone())
    gc.collect()
    assert cells() is None


def test_the_attention_alone_is_timed_without_the_rest() -> None:
    layer, x = dense(), torch.randn(4, 16, 6, 6)
    step = layer.call(x)
    x.grad = torch.zeros_like(x)
    before = layer.attention.norm.running_mean.clone()
    step.attend(x, alone=True)
    assert not x.grad.any()
    step.attend(x)
    assert x.grad.any()
    assert torch.equal(layer.attention.norm.running_mean, before)
    assert layer.warehouse.cells.grad is None
