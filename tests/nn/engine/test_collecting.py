"""The gradient of a warehouse's cells that its layers add to: the same numbers, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, share_warehouse
from kw_lightning.nn.engine import collecting, computing, native


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return, for every layer's backward pass, whether it added to the gradient of others; filled as they run."""
    found = []

    def backward(*arguments: object) -> list[Tensor]:
        found.append(arguments[-1] is not None)
        return original(*arguments)  # type: ignore[arg-type]

    def differentiate(*arguments: object, adds: bool) -> None:
        found.append(adds)
        original_step(*arguments, adds=adds)  # type: ignore[arg-type]

    original, original_step = computing.backward, native.Step.differentiate
    monkeypatch.setattr(collecting.computing, "backward", backward)
    monkeypatch.setattr(native.Step, "differentiate", differentiate)
    return found


def make_network(engine: str = "auto") -> tuple[nn.Sequential, nn.Parameter]:
    """Return three layers of one warehouse, and its cells."""
    torch.manual_seed(0)
    layers = [KWConv2d(16, 16, 3, padding=1, bias=False) for _ in range(3)]
    share_warehouse(layers, budget=2)
    for layer in layers:
        layer.engine = engine
    return nn.Sequential(*layers), layers[0].warehouse.cells


def wanted_gradient(cells: Tensor, make_loss: Callable[[], Tensor], network: nn.Module) -> Tensor:
    """Return the gradient by the literal form, whose operators are torch's own."""
    for layer in network:
        layer.engine = "reference"
    (found,) = torch.autograd.grad(make_loss(), cells)
    return found


def x() -> Tensor:
    return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("engine", ["auto", "mix_kernels", "mix_inputs", "mix_outputs"])
def test_layers_of_a_warehouse_add_to_one_gradient(engine: str, added: list[bool]) -> None:
    network, cells = make_network(engine)
    loss = network(x()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert added == [False, True, True] * 2
    wanted = wanted_gradient(cells, lambda: network(x()).square().sum(), network)
    torch.testing.assert_close(cells.grad, 2 * wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_other_gradients_of_the_cells_are_added_wherever_they_come(place: int) -> None:
    network, cells = make_network()

    def make_loss() -> Tensor:
        y, penalty = x(), torch.zeros(())
        for index, layer in enumerate([*network, None]):
            if index == place:
                penalty = (cells * torch.arange(len(cells)).view(-1, 1, 1, 1, 1)).square().sum()
                y = y + 0 * penalty  # at this place of the graph
            y = y if layer is None else layer(y)
        return y.square().sum() + penalty

    make_loss().backward()
    torch.testing.assert_close(cells.grad, wanted_gradient(cells, make_loss, network), rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_replaced_on_its_way_is_not_added_to(added: list[bool]) -> None:
    network, cells = make_network()
    seen: list[Tensor] = []

    def replace(gradients: Sequence[Tensor | None], _: object) -> tuple[Tensor | None, ...]:
        seen.extend(g for g in gradients if g is not None and g.shape == cells.shape)
        return tuple(2 * g if g is not None and g.shape == cells.shape else g for g in gradients)

    between, y = [], x()
    for layer in network:
        y = layer(y)
        between.append(y)
    assert between[2].grad_fn is not None
    between[2].grad_fn.register_hook(replace)
    between[2].square().sum().backward()
    assert added == [False, False, False]
    others = wanted_gradient(cells, lambda: network(x()).square().sum(), network)
    torch.testing.assert_close(cells.grad, others + seen[0], rtol=1e-4, atol=1e-4)


def test_a_backward_pass_that_fails_leaves_nothing_to_the_next(added: list[bool]) -> None:
    network, cells = make_network()
    y = network[1](network[2](x()))
    y.register_hook(lambda gradient: 1 / 0 if len(added) == 1 else None)
    with pytest.raises(ZeroDivisionError):
        network[0](y).square().sum().backward()
    assert added == [False]
    assert cells.grad is None
    network(x()).square().sum().backward()
    assert added == [False, False, True, True]
    torch.testing.assert_close(
        cells.grad, wanted_gradient(cells, lambda: network(x()).square().sum(), network), rtol=1e-4, atol=1e-4
    )


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_threads_that_share_a_block_of_lanes_add_to_it_too() -> None:
    network, cells = make_network()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        network(x()).square().sum().backward()
    finally:
        torch.set_num_threads(threads)
    wanted = wanted_gradient(cells, lambda: network(x()).square().sum(), network)
    torch.testing.assert_close(cells.grad, wanted, rtol=1e-4, atol=1e-4)
