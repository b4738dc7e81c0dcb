"""Epilogues found behind layers: the same numbers in evaluation, and the former network in all else."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kw_lightning
from kw_lightning.nn import KWConv2d, share_warehouse
from kw_lightning.nn.engine import Epilogue
from kw_lightning.nn.finishing import add_epilogues, epilogues, remove_epilogues
from kw_lightning.recipe import load_recipe


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block; each test changes what it does."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = KWConv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = KWConv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.act = activation or nn.ReLU(inplace=True)
        share_warehouse([self.conv1, self.conv2], budget=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.act(out)


def trained(network: nn.Module) -> nn.Module:
    """Return a network whose norms have seen something, in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the epilogues that layers were given, and what they were."""
    counted: Counter[str] = Counter()
    real = KWConv2d.finished

    def count(self: KWConv2d, x: Tensor, epilogue: Epilogue) -> Tensor:
        named = {"norm": epilogue.norm, "sum": epilogue.added, epilogue.activation or "": epilogue.activation}
        counted["+".join(name for name, part in named.items() if part is not None)] += 1
        return real(self, x, epilogue)

    monkeypatch.setattr(KWConv2d.__mro__[1], "finished", count)
    return counted


def check(network: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Compare a network with and without epilogues."""
    with torch.inference_mode():
        expected = network(x)
        with epilogues(network):
            found = network(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (torchvision.models.resnet18, {"norm+relu": 8, "norm": 3, "norm+sum+relu": 8}),
    "mobilenet": (torchvision.models.mobilenet_v2, {"norm+relu6": 17, "norm": 6, "norm+sum": 10}),
    "timm resnet": (lambda: timm.create_model("resnet10t"), {"norm+relu": 4, "norm": 3, "norm+sum+relu": 4}),
    "timm mobilenet": (
        lambda: timm.create_model("mobilenetv2_050"),
        {"norm+relu6": 16, "norm": 4, "norm+sum": 7},
    ),
}


KERAS = {
    "kw": 1,
    "name": "own",
    "model": {
        "input": [3, 16, 16],
        "layers": [
            {"Conv2D": {"filters": 16, "kernel_size": 3, "use_bias": False}},
            "BatchNormalization",
            {"Activation": {"activation": "relu"}},
            "GlobalAveragePooling2D",
            {"Dense": {"units": 5}},
        ],
    },
    "warehouses": {"all": {"layers": [{"type": "Conv2d"}]}},
}


def made(name: str) -> tuple[nn.Module, dict[str, int]]:
    """Return a network of a library with dynamic convolutions, and what is to be found in it."""
    make, found = NETWORKS[name]
    network = make()
    kw_lightning.convert(network, {"kw": 1, "name": "all", "model": {"input": [3, 64, 64]}, "stages": "auto"})
    return trained(network), found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "timm resnet", "timm mobilenet"])
def test_networks_of_libraries_compute_the_same_with_norms_and_activations_within(
    name: str, finished: Counter[str]
) -> None:
    network, expected = made(name)
    check(network, torch.randn(2, 3, 32, 32))
    assert {what: count for what, count in finished.items() if what} == expected
    assert sum(expected.values()) == sum(isinstance(module, KWConv2d) for module in network.modules())


def test_a_network_in_keras_words_and_a_sequence_do_too(finished: Counter[str]) -> None:
    check(trained(kw_lightning.build(load_recipe(KERAS))), torch.randn(2, 3, 16, 16))
    assert finished["norm+relu"] == 1
    layers = [KWConv2d(4, 8, 3, bias=False), KWConv2d(8, 4, 1)]
    share_warehouse(layers, budget=1)
    sequence = nn.Sequential(layers[0], nn.BatchNorm2d(8), nn.Identity(), nn.SiLU(), layers[1], nn.Hardswish())
    check(trained(sequence), torch.randn(2, 4, 7, 7))
    assert finished["norm+silu"] == finished["hardswish"] == 1


def test_static_convolutions_before_norms_are_folded_where_that_is_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    block.conv1 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")  # type: ignore[assignment]
    called = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda _, y: called.append(True) or y)
    network = trained(block)
    with torch.inference_mode(), epilogues(network):
        network(torch.randn(2, 8, 9, 9))
        assert not called
        network(torch.randn(2, 8, 2, 2))
        assert called
    monkeypatch.undo()
    check(network, torch.randn(2, 8, 9, 9))


def test_state_modes_and_training_are_those_of_the_former_network(finished: Counter[str]) -> None:
    network = trained(Block())
    state, names = list(network.state_dict()), [name for name, _ in network.named_modules()]
    former, x = copy.deepcopy(network), torch.randn(2, 8, 6, 6)
    assert add_epilogues(network) == 2
    assert list(network.state_dict()) == state
    assert [name for name, _ in network.named_modules()] == names
    for training in (True, False):  # with gradients, in either mode
        gradients = []
        for one in (network, former):
            one.train(training)
            one.zero_grad()
            one(x).square().mean().backward()
            gradients.append([p.grad for p in one.parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(network.norm1.running_mean, former.norm1.running_mean, rtol=0, atol=0)  # type: ignore
    with torch.no_grad():
        network.train()(x)
    assert set(finished) == {""}
    remove_epilogues(network)
    assert all("forward" not in vars(module) for module in network.modules())


def test_weights_and_statistics_may_change_at_any_time() -> None:
    network, other = trained(Block()), trained(Block())
    x = torch.randn(2, 8, 6, 6)
    add_epilogues(network)
    with torch.inference_mode():
        before = network(x)
        network.load_state_dict(other.state_dict())
        torch.testing.assert_close(network(x), other(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(network(x), before, atol=1e-3)
    for one in (network, other):
        one.norm1.weight.data.mul_(2)  # type: ignore[operator, union-attr]
        one.norm2.running_var.data = one.norm2.running_var.data * 3  # type: ignore[operator, union-attr]
        one.double()
    with torch.inference_mode():
        torch.testing.assert_close(network(x.double()), other(x.double()), rtol=1e-9, atol=1e-9)


def test_copies_and_pickles_compute_the_same_and_can_have_their_own() -> None:
    network, x = trained(Block()), torch.randn(2, 8, 6, 6)
    add_epilogues(network)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.inference_mode():
            torch.testing.assert_close(other(x), network(x), rtol=1e-5, atol=1e-5)
        assert add_epilogues(other) == 2
        assert add_epilogues(other) == 0  # they are there
        nn.init.constant_(other.norm2.bias, 100)
        with torch.inference_mode():
            assert float(other(x).min()) > 50 > float(network(x).min())


def watch(module: nn.Module) -> list[object]:
    seen: list[object] = []
    module.register_forward_hook(lambda *_: seen.append(True))
    return seen


@pytest.mark.parametrize("name", ["conv1", "norm1", "act"])
def test_hooks_are_called_whenever_they_were_registered(name: str, finished: Counter[str]) -> None:
    for early in (True, False):
        network, x = trained(Block()), torch.randn(1, 8, 5, 5)
        seen = watch(getattr(network, name)) if early else []
        add_epilogues(network)
        seen = seen if early else watch(getattr(network, name))
        with torch.inference_mode():
            network(x)
        assert len(seen) == (2 if name == "act" else 1)
    counted = {what: count for what, count in finished.items() if what}
    assert counted == ({} if name == "act" else {"norm+sum+relu": 2})


def test_norms_that_are_trained_or_changed_are_computed_by_themselves(finished: Counter[str]) -> None:
    x = torch.randn(4, 8, 5, 5)

    def batch_statistics(block: Block) -> None:
        block.norm1.train()

    def no_statistics(block: Block) -> None:
        block.norm1 = nn.BatchNorm2d(8, track_running_stats=False)

    def parametrized(block: Block) -> None:
        nn.utils.parametrize.register_parametrization(block.norm1, "weight", nn.Softplus())

    def subclass(block: Block) -> None:
        block.norm1.__class__ = type("Own", (nn.BatchNorm2d,), {"forward": lambda self, y: y + 1})

    for change in (batch_statistics, no_statistics, parametrized, subclass):
        for early in (True, False):
            network = trained(Block())
            if early:
                change(network)  # type: ignore[arg-type]
            with epilogues(network), torch.inference_mode():
                if not early:
                    change(network)  # type: ignore[arg-type]
                finished.clear()
                found = network(x)
            former = copy.deepcopy(network)
            with torch.inference_mode():
                torch.testing.assert_close(found, former(x), rtol=1e-4, atol=1e-4)
            assert finished["norm+relu"] == 0, change
            assert finished["norm+sum+relu"] == (1 if early or change is not no_statistics else 0)


def test_a_module_that_is_replaced_counts_at_once() -> None:
    network, x = trained(Block()), torch.randn(1, 8, 5, 5)
    add_epilogues(network)
    network.act = nn.Tanh()
    with torch.inference_mode():
        assert -1 <= float(network(x).min()) < 0


def test_a_norm_used_twice_is_right_at_both_places(finished: Counter[str]) -> None:
    network = trained(Block())
    network.norm2 = network.norm1
    check(network, torch.randn(2, 8, 5, 5))
    assert finished["norm+relu"] == finished["norm+sum+relu"] == 1


def asks_values(self: Block, x: Tensor) -> Tensor:
    return self.norm1(self.conv1(x)) if x.sum() > 0 else self.conv1(x)  # type: ignore[no-any-return]


def asks_types(self: Block, x: Tensor) -> Tensor:
    y = self.norm1(self.conv1(x))
    return y if isinstance(x, Tensor) else y + 1  # type: ignore[no-any-return]


def takes_more(self: Block, x: Tensor, skip: Tensor | None = None) -> Tensor:
    y = self.norm1(self.conv1(x))
    return y if skip is None else y + skip  # type: ignore[no-any-return]


def draws(self: Block, x: Tensor) -> Tensor:
    return self.norm1(self.conv1(x)) * torch.ones(1)  # type: ignore[no-any-return]


def remembers(self: Block, x: Tensor) -> Tensor:
    self.last = self.norm1(self.conv1(x))
    return self.last


def collects(self: Block, x: Tensor) -> Tensor:
    y = self.norm1(self.conv1(x))
    self.seen = [*getattr(self, "seen", []), y]
    return y  # type: ignore[no-any-return]


def changes_precision(self: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.norm1(self.conv1(x)).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [asks_values, asks_types, draws, remembers, collects, changes_precision])
def test_what_cannot_be_followed_stays_as_it_is(forward: Callable[..., Tensor]) -> None:
    network = trained(Block())
    network.__class__ = type("Odd", (Block,), {"forward": forward})
    held = dict(vars(network))
    with epilogues(network) as found:
        assert found == 0
        assert vars(network) == held
        with torch.inference_mode():
            network(torch.randn(2, 8, 5, 5))


def test_inputs_that_may_be_left_out_count_where_they_are_given(finished: Counter[str]) -> None:
    network, x = trained(Block()), torch.randn(2, 8, 5, 5)
    network.__class__ = type("Odd", (Block,), {"forward": takes_more})
    check(network, x)
    assert finished["norm"] == 1
    with torch.inference_mode(), epilogues(network):
        torch.testing.assert_close(network(x, x), network(x) + x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(network(x, skip=x), network(x) + x, rtol=1e-5, atol=1e-5)


def changes_its_input(self: Block, x: Tensor) -> Tensor:
    x += self.norm1(self.conv1(x))
    return x


def test_an_input_that_is_changed_in_place_is_changed() -> None:
    network = trained(Block())
    network.__class__ = type("Odd", (Block,), {"forward": changes_its_input})
    with torch.inference_mode(), epilogues(network) as found:
        x = torch.randn(2, 8, 5, 5)
        assert found == 1
        assert network(x) is x


def seen_twice(self: Block, x: Tensor) -> Tensor:
    y = self.conv1(x)
    return self.norm1(y) + y  # type: ignore[no-any-return]


def into_the_other(self: Block, x: Tensor) -> Tensor:
    other = x * 1
    other += self.norm1(self.conv1(x))
    return other


def written_between(self: Block, x: Tensor) -> Tensor:
    other = x * 1
    y = self.norm1(self.conv1(other))
    other.mul_(-1)
    return F.relu(y + other)


def written_after(self: Block, x: Tensor) -> Tensor:
    other = x * 1
    y = self.conv1(other)
    other.mul_(-1)
    return F.relu(self.norm1(y))


def to_itself(self: Block, x: Tensor) -> Tensor:
    y = self.norm1(self.conv1(x))
    return y + y  # type: ignore[no-any-return]


def broadcast(self: Block, x: Tensor) -> Tensor:
    return torch.add(x.mean((2, 3), keepdim=True), self.norm1(self.conv1(x))).relu()


def layer_alone(self: Block, x: Tensor) -> Tensor:
    return torch.relu(self.conv2(x))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (seen_twice, ""),
        (into_the_other, "norm"),
        (written_between, "norm"),
        (written_after, "norm+relu"),
        (to_itself, "norm"),
        (broadcast, "norm+sum+relu"),
        (layer_alone, "relu"),
    ],
)
def test_only_what_nothing_else_sees_goes_into_a_layer(
    forward: Callable[..., Tensor], expected: str, finished: Counter[str]
) -> None:
    network = trained(Block())
    network.__class__ = type("Other", (Block,), {"forward": forward})
    check(network, torch.randn(2, 8, 9, 9))
    assert [what for what in finished if what] == ([expected] if expected else [])


@pytest.mark.filterwarnings("ignore")
def test_whoever_looks_on_sees_the_former_network(finished: Counter[str]) -> None:
    network, x = trained(Block()), torch.randn(1, 8, 5, 5)
    add_epilogues(network)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x)
    assert counter.get_total_flops() > 0
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        torch.jit.trace(network, x, check_trace=False)
        torch.func.vmap(network)(x.unsqueeze(0))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.fx.symbolic_trace(network)
    assert set(finished) == {""}


def test_a_compiled_network_has_one_operator_for_a_layer_and_what_comes_after_it() -> None:
    before = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    network = trained(nn.Sequential(*before, Block()))
    x = torch.randn(2, 3, 14, 12)
    called: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        called.extend(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = network(x)
        with epilogues(network):
            compiled = torch.compile(network, fullgraph=True, backend=note)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
            network[4].norm2.weight.mul_(2)
            found = compiled(x)
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    counted = Counter(called)
    assert counted["attended_convolution"] == 2
    assert counted["batch_norm"] == counted["relu_"] == counted["linear"] == 0


def test_a_context_that_is_entered_again_is_not_compiled_again() -> None:
    network, x = trained(Block()), torch.randn(2, 8, 6, 6)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter)

    def run() -> Tensor:
        with torch.no_grad(), epilogues(network):
            torch.testing.assert_close(found := compiled(x), network(x))
        return found

    run()
    before = run()
    assert counter.frame_count == 1
    network.act = nn.SiLU()
    assert not torch.allclose(run(), before)
    assert counter.frame_count == 2


@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, True), (True, False)])
def test_a_static_convolution_takes_its_norms_factors(bias: bool, affine: bool) -> None:
    norm = nn.BatchNorm2d(8, affine=affine)
    check(trained(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), norm, nn.ReLU())), torch.randn(2, 3, 14, 12))


def test_half_precision_and_the_literal_form_round_as_before(finished: Counter[str]) -> None:
    network, x = trained(Block()), torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        check(network, x, 1e-9)
    for layer in (network.conv1, network.conv2):
        layer.engine = "reference"  # type: ignore[assignment, union-attr]
    check(network, x, 1e-9)
    assert finished["norm+relu"] == 1  # of bfloat16


def test_a_recipe_can_turn_it_off() -> None:
    assert add_epilogues(kw_lightning.build(load_recipe(KERAS)).eval()) == 1
    assert add_epilogues(kw_lightning.build(load_recipe(KERAS | {"epilogue": False})).eval()) == 0


def test_threads_evaluate_at_once() -> None:
    network, x = trained(Block()), torch.randn(2, 8, 9, 9)
    add_epilogues(network)
    found: list[Tensor] = []

    def work() -> None:
        with torch.inference_mode():
            found.extend(network(x) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 30
    assert all(torch.equal(one, found[0]) for one in found)
