"""Layers in plain evaluation, each as one call that is told once: the same numbers, and never of what was before."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn import layer as layer_module
from kw_lightning.nn.engine import Epilogue, Norm, bases, native, workspace
from kw_lightning.nn.engine.workspace import scratch
from kw_lightning.nn.evaluation import MOST_CALLS

compiled = pytest.mark.skipif(not native.available(), reason="no C compiler")
pytestmark = compiled


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return what the calls that are told once have given."""
    found: list[Tensor] = []
    real = native.Evaluation.run

    def run(self: native.Evaluation, x: Tensor, added: Tensor | None) -> Tensor:
        found.append(real(self, x, added))
        return found[-1]

    monkeypatch.setattr(native.Evaluation, "run", run)
    return found


def made(layer: KWLayer, *, temperature: float = 0.3, **options: Any) -> Any:
    share_warehouse([layer], budget=options.pop("budget", 2), **options)
    set_temperature(layer, temperature)
    norm = layer.attention.norm  # type: ignore[union-attr]
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return layer.eval()


def dense(**options: Any) -> KWConv2d:
    return made(KWConv2d(16, 32, 3, padding=1), **options)  # type: ignore[no-any-return]


def by_operators(layer: Any, x: Tensor, epilogue: Epilogue = layer_module.NOTHING) -> Tensor:
    """Return what the layer gives without such calls, by the literal form."""
    engine, layer.engine = layer.engine, "reference"
    try:
        y: Tensor = epilogue.apply(layer(x).clone())
    finally:
        layer.engine = engine
    return y


LAYERS: dict[str, Callable[[], Any]] = {
    "dense": dense,
    "winograd": lambda: made(KWConv2d(32, 32, 3, padding=1)),
    "pointwise": lambda: made(KWConv2d(24, 40, 1, bias=False)),
    "strided": lambda: made(KWConv2d(16, 16, 3, stride=2, padding=1), temperature=0.0),
    "reaching over the edge": lambda: made(KWConv2d(16, 16, 3, padding=8, dilation=8)),
    "depthwise": lambda: made(KWConv2d(24, 24, 3, padding=1, groups=24)),
    "in groups": lambda: made(KWConv2d(16, 32, 3, padding=1, groups=4)),
    "one dimension": lambda: made(KWConv1d(16, 24, 3, padding=1)),
    "three dimensions": lambda: made(KWConv3d(16, 16, 3, padding=1)),
    "layer norm": lambda: made(KWConv2d(16, 32, 3, padding=1), norm="layer"),
    "no start": lambda: made(KWConv2d(16, 32, 3, padding=1), start="none"),
    "folded": lambda: folded(dense()),
}


def folded(layer: KWConv2d) -> KWConv2d:
    layer.output_scale = torch.rand(32) + 0.5
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_its_operators_give(name: str, runs: list[Tensor]) -> None:
    layer = LAYERS[name]()
    dimensions = len(layer.kernel_shape) - 2
    with torch.inference_mode(), bases("never"):
        for batch, side in ((1, 7), (2, 4), (33, 3), (1, 7)):
            x = torch.randn(batch, layer.in_channels, *[side] * dimensions) + 1
            for each in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
                found = layer(each)
                torch.testing.assert_close(found, by_operators(layer, each), rtol=1e-4, atol=1e-4)
                assert found.is_contiguous() == each.is_contiguous()
    assert len(runs) == 8


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_gives_what_its_operators_give(bias: bool, runs: list[Tensor]) -> None:
    layer = made(KWLinear(16, 40, bias=bias))
    with torch.inference_mode(), bases("never"):
        for shape in ((1, 9), (3,), (33, 2, 3), (2, 1), (1, 9)):
            x = torch.randn(*shape, 16) + 1
            torch.testing.assert_close(layer(x), by_operators(layer, x), rtol=1e-4, atol=1e-4)
        assert len(runs) == 5
        x = torch.randn(4, 16, 9).transpose(1, 2)  # tokens last in memory, as a map with its channels first
        torch.testing.assert_close(layer(x), by_operators(layer, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x[0, 0]), by_operators(layer, x[0, 0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_comes_after_a_layer_is_done_within_the_call(batch: int, runs: list[Tensor]) -> None:
    layer, x = dense(), torch.randn(batch, 16, 6, 6)
    mean, variance, weight, shift = torch.rand(4, 32)
    with torch.no_grad():
        for added in (None, torch.randn(batch, 32, 6, 6)):
            epilogue = Epilogue(None, None, Norm(mean, variance, weight, shift, 1e-3), added, "hardswish")
            expected = by_operators(layer, x, epilogue)
            torch.testing.assert_close(layer.finished(x, epilogue), expected, rtol=1e-4, atol=1e-4)
        mean.neg_()
        expected = by_operators(layer, x, epilogue)
        torch.testing.assert_close(layer.finished(x, epilogue), expected, rtol=1e-4, atol=1e-4)
    assert len(runs) == 3


def scale_in_place(layer: KWConv2d) -> None:
    with torch.no_grad():
        layer.warehouse.cells.mul_(2)


def swap_past_the_version(layer: KWConv2d) -> None:
    layer.attention.expand.weight.data = layer.attention.expand.weight.data.flip(0).clone()


def load_another_state(layer: KWConv2d) -> None:
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()}, assign=True)


def average(layer: KWConv2d) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.module.attention.expand.weight.data.mul_(-1)
    for own, other in zip(layer.parameters(), averaged.module.parameters(), strict=True):
        own.data, other.data = other.data, own.data


def heat(layer: KWConv2d) -> None:
    set_temperature(layer, 0.9)


def there_and_back(layer: KWConv2d) -> None:
    layer.double()
    layer.float()
    layer.warehouse.cells.data.neg_()


def turn_a_weight(layer: KWConv2d) -> None:
    weight = layer.attention.reduce.weight
    weight.data = weight.data.flip(1).t().contiguous().t()  # the same numbers, elsewhere and not as they lay


def replace_the_bias(layer: KWConv2d) -> None:
    layer.bias = nn.Parameter(torch.ones(32))


def drop_the_bias(layer: KWConv2d) -> None:
    layer.bias = None


def widen_epsilon(layer: KWConv2d) -> None:
    layer.attention.norm.eps = 30.0


def take_steps(layer: KWConv2d) -> None:
    layer.stride = (2, 2)


def train_and_stop(layer: KWConv2d) -> None:
    layer.train()
    layer(torch.randn(4, 16, 6, 6) - 3).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    layer.eval()


CHANGES = (
    scale_in_place,
    swap_past_the_version,
    load_another_state,
    average,
    heat,
    there_and_back,
    turn_a_weight,
    replace_the_bias,
    drop_the_bias,
    widen_epsilon,
    take_steps,
    train_and_stop,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_once(change: Callable[[KWConv2d], None], runs: list[Tensor]) -> None:
    layer, x = dense(), torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    assert len(runs) == 2
    change(layer)
    with torch.no_grad():
        found = layer(x)
        torch.testing.assert_close(found, by_operators(layer, x), rtol=1e-4, atol=1e-4)
    assert found.shape != first.shape or not torch.allclose(found, first, rtol=1e-3, atol=1e-3)


@pytest.fixture
def graphs() -> list[Counter[str]]:
    """Return how often each operator is called in the graphs that `compiled_by` makes."""
    torch._dynamo.reset()
    return []


def compiled_by(graphs: list[Counter[str]], function: Any) -> Any:
    """Return a function, or a module, in graphs that torch.compile makes of all of it and that are run as they are."""

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(Counter(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes))
        return graph

    return torch.compile(function, fullgraph=True, backend=note)


def test_a_change_counts_at_once_in_a_compiled_graph_too(runs: list[Tensor], graphs: list[Counter[str]]) -> None:
    layer, x = dense(), torch.randn(1, 16, 6, 6)
    compiled = compiled_by(graphs, layer)
    with torch.no_grad():
        before = compiled(x)
        for change in (scale_in_place, swap_past_the_version, load_another_state, average, heat, replace_the_bias):
            change(layer)
            found = compiled(x)
            torch.testing.assert_close(found, by_operators(layer, x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)
            before = found
        assert len(runs) == 7
        assert len(graphs) == 1  # none of these is anything that a graph goes by
        for change in (there_and_back, widen_epsilon, take_steps):
            change(layer)
            torch.testing.assert_close(compiled(x), by_operators(layer, x), rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(layer)
        scale_in_place(twin)
        of_twin = compiled_by(graphs, twin)(x)
        torch.testing.assert_close(of_twin, by_operators(twin, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x), by_operators(layer, x), rtol=1e-4, atol=1e-4)
    assert all(graph["attended_convolution"] == 1 for graph in graphs)


def test_a_compiled_graph_takes_the_parameters_that_it_is_given(graphs: list[Counter[str]]) -> None:
    layer, x = dense(), torch.randn(1, 16, 6, 6)
    others = {name: -2 * tensor for name, tensor in layer.named_parameters()}
    compiled = compiled_by(graphs, lambda others, x: torch.func.functional_call(layer, others, (x,)))
    with torch.no_grad():
        found = compiled(others, x)
        torch.testing.assert_close(found, torch.func.functional_call(layer, others, (x,)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, layer(x), rtol=1e-2, atol=1e-2)
    assert graphs[0]["attended_convolution"] == 1


def test_who_looks_into_a_compiled_layer_gets_its_operators(graphs: list[Counter[str]]) -> None:
    layer, x = dense(), torch.randn(2, 16, 6, 6)
    seen: list[Tensor] = []
    handle = layer.attention.expand.register_forward_hook(lambda module, inputs, y: seen.append(y))
    with torch.no_grad():
        heard = compiled_by(graphs, layer)(x)
        assert len(seen) == 1
        handle.remove()
        torch._dynamo.reset()  # not every torch looks at hooks again
        compiled = compiled_by(graphs, layer)
        torch.testing.assert_close(compiled(x), heard, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype == torch.bfloat16
    compiled(x).sum().backward()
    assert layer.attention.expand.weight.grad is not None
    assert [graph["attended_convolution"] for graph in graphs] == [0, 1, 0, 0]


def test_whoever_looks_on_or_differentiates_gets_the_operators(runs: list[Tensor]) -> None:
    layer, x = dense(), torch.randn(1, 16, 6, 6)
    attention = layer.attention
    with torch.no_grad():
        layer(x)
        assert len(runs) == 1
        for module in (attention, attention.reduce, attention.norm, attention.expand):
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda module, inputs, y, seen=seen: seen.append(y))
            layer(x)
            handle.remove()
            assert len(seen) == 1
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.func.vmap(layer, randomness="different")(x.unsqueeze(0))
        layer.double()(x.double())
        layer.float().attention.norm.train()
        layer(x)
    layer.eval()(x).sum().backward()
    assert attention.expand.weight.grad is not None
    assert len(runs) == 1
    with torch.no_grad():
        torch.jit.trace(layer, (x,), check_trace=False)
        torch.export.export(layer, (x,))
    assert len(runs) == 1
    with torch.no_grad():
        layer(x)
    assert len(runs) == 2


@pytest.mark.parametrize("x", [torch.randn(16, 6, 6), torch.randn(0, 16, 6, 6), torch.randn(2, 16, 12, 12)[..., ::2]])
def test_inputs_for_which_there_is_no_such_call_are_computed_as_ever(x: Tensor, runs: list[Tensor]) -> None:
    layer = dense()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_operators(layer, x), rtol=1e-4, atol=1e-4)
    assert not runs


@pytest.mark.parametrize("x", [torch.randn(1, 8, 6, 6), torch.randn(1, 16, 6), torch.randn(1, 16, 6, 6).double()])
def test_inputs_that_do_not_fit_are_refused_as_ever(x: Tensor) -> None:
    layer = dense()
    with torch.no_grad():
        layer(torch.randn(1, 16, 6, 6))
        with pytest.raises(RuntimeError, match=r"expected x of|should be the same"):
            layer(x)


def test_copies_and_pickles_have_calls_of_their_own(runs: list[Tensor]) -> None:
    layer, x = dense(), torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        first = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            scale_in_place(twin)
            torch.testing.assert_close(twin(x), by_operators(twin, x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(twin(x), first, rtol=1e-3, atol=1e-3)
        assert torch.equal(layer(x), first)
    assert len(runs) == 6


def test_a_layer_is_let_go_and_keeps_calls_of_a_few_sizes_alone() -> None:
    layer = dense()
    with torch.no_grad():
        for side in range(3, MOST_CALLS + 6):
            layer(torch.randn(1, 16, side, side))
    assert 0 < len(layer.calls.found) <= MOST_CALLS
    cells = weakref.ref(layer.warehouse.cells)
    layer.warehouse.cells = nn.Parameter(layer.warehouse.cells.detach().clone())
    gc.collect()
    assert cells() is None


def test_threads_may_call_one_layer_at_once_and_settings_count() -> None:
    layer, threads = dense(), torch.get_num_threads()
    xs = [torch.randn(1, 16, side, side) for side in (5, 6, 7, 8)]
    with torch.no_grad():
        expected = [by_operators(layer, x) for x in xs]
    failures: list[float] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(30):
                failures.append(float((layer(xs[index]) - expected[index]).abs().max()))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(failures) == 120
    assert max(failures) < 1e-4
    try:
        with torch.no_grad(), workspace(4096):
            torch.set_num_threads(3 - min(threads, 2))
            torch.testing.assert_close(layer(xs[0]), expected[0], rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_the_attention_alone_is_made_as_within_the_call() -> None:
    layer, x = dense(), torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        call = layer.evaluation(x)
        assert call is not None
        call.attend(x)
        memory = scratch("native", (call.numbers,), x)
        torch.testing.assert_close(alpha_within(memory, layer.attend(x)), layer.attend(x), rtol=1e-4, atol=1e-5)
        memory.fill_(7)
        call.attend(x, alone=True)
        assert memory.eq(7).all()


def alpha_within(memory: Tensor, alpha: Tensor) -> Tensor:
    """Return the place in the memory of a call that is most like α [batch, mixtures, cells]."""
    windows = memory[: 8 * alpha.numel() + 4096].unfold(0, alpha.numel(), 1)
    distances = (windows.nan_to_num() - alpha.flatten()).abs().amax(1)
    return windows[int(distances.argmin())].view_as(alpha)
