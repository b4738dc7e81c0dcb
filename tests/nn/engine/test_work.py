"""Counted multiply-adds against what torch counts in the products that the paths are made of."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from geometries import LAYERS, problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kw_lightning.nn import KWConv2d, KWLinear, share_warehouse
from kw_lightning.nn.engine import ENGINES, Convolution, computing, dynamic_convolution, orders, work
from kw_lightning.nn.engine.paths import PATHS, Path, find_path, order_of
from kw_lightning.nn.engine.paths.compiled import CompiledPath

# A path of each order whose products torch counts one by one, and of which none is saved or wasted.
COUNTED = {
    "mix_kernels": find_path("mix_kernels/per_sample"),
    "mix_outputs": find_path("mix_outputs/by_cell"),
    "mix_inputs": find_path("mix_inputs/by_cell"),
}
CONVOLUTIONS = {
    "3×3": (Convolution((6, 8, 3, 3), (3, 4, 1, 1), (1, 1), (1, 1), (1, 1)), (7, 6)),
    "strided": (Convolution((6, 8, 3, 3), (3, 4, 1, 1), (2, 2), (1, 1), (1, 1)), (8, 6)),
    "whole": (Convolution((6, 8, 2, 3), (3, 4, 2, 3), (1, 1), (0, 1), (1, 1)), (7, 6)),
    "1-D": (Convolution((6, 8, 5), (3, 8, 1), (1,), (2,), (1,)), (9,)),
    "tokens": (Convolution((6, 8), (2, 4)).over_tokens(), (5,)),
}
BATCH, CELLS = 3, 5


def products() -> FlopCounterMode:
    """Return a counter that knows products in place as well, which torch's own overlooks."""

    def in_place(place: torch.Size, a: torch.Size, b: torch.Size, *, out_shape: torch.Size) -> int:
        return 2 * math.prod(a) * b[-1]

    mapping = {torch.ops.aten.addmm_: in_place, torch.ops.aten.baddbmm_: in_place}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def make(convolution: Convolution, size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    mixtures = math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)
    x = torch.randn(BATCH, convolution.kernel_shape[1] * convolution.groups, *size, dtype=torch.float64)
    return (
        x,
        torch.randn(BATCH, mixtures, CELLS, dtype=torch.float64),
        torch.randn(CELLS, *convolution.cell_shape, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("order", orders.ORDERS)
def test_the_count_of_an_order_is_that_of_its_products(order: str, name: str) -> None:
    convolution, size = CONVOLUTIONS[name]
    tensors = make(convolution, size)
    with products() as counter:
        y = computing.forward(*tensors, convolution, COUNTED[order])
    inputs, outputs = math.prod(size), math.prod(y.shape[2:])
    assert counter.get_total_flops() == 2 * BATCH * sum(orders.count(order, convolution, CELLS, inputs, outputs))
    for needed in itertools.product([False, True], repeat=3):
        if needed[0] or (any(needed) and order != "mix_kernels"):  # that path mixes kernels without need, too
            with products() as counter:
                computing.backward(y, *tensors, convolution, COUNTED[order], needed)
            counted = work.backward(order, convolution, CELLS, inputs, outputs, needed)
            assert counter.get_total_flops() == 2 * BATCH * counted, needed


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_load_of_a_path_is_its_orders_count(path: Path) -> None:
    ratios = []
    for name in LAYERS:
        posed = problem(name, 4)
        # Triton's refusal is that of a machine without a GPU: what it counts is the same everywhere.
        if path.refusal(posed) is None or path.name == "mix_kernels/triton":
            positions = math.prod(posed.size), math.prod(posed.convolution.output_size(posed.size))
            counted = orders.count(order_of(path), posed.convolution, posed.cells, *positions)
            found = path.load(posed)
            ratios.append((found.mixing + found.products) / (4 * sum(counted)))
    if isinstance(path, CompiledPath):  # they leave out the padding, or take Winograd's form; narrow cells leave lanes
        assert all(0.4 < ratio <= 2 for ratio in ratios)
    else:
        assert set(ratios) == {1.0}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flop_counters_see_the_operator_as_it_is_counted(name: str, engine: str) -> None:
    convolution, size = CONVOLUTIONS[name]
    x, attention, cells = (tensor.requires_grad_() for tensor in make(convolution, size))
    with FlopCounterMode(display=False) as forward:
        y = dynamic_convolution(x, attention, cells, convolution, engine)
    inputs, outputs = math.prod(size), math.prod(y.shape[2:])
    assert forward.get_total_flops() == 2 * BATCH * work.forward(engine, convolution, CELLS, inputs, outputs)
    if engine == "reference":  # autograd keeps its kernels, where the engine mixes them anew
        return
    for needed in ([True] * 3, [False, True, True], [True, False, False]):
        wanted = [tensor for tensor, need in zip((x, attention, cells), needed, strict=True) if need]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y.sum(), wanted, retain_graph=True)
        counted = work.backward(engine, convolution, CELLS, inputs, outputs, [True] * 3)
        assert backward.get_total_flops() <= 2 * BATCH * counted
        if all(needed):
            assert backward.get_total_flops() == 2 * BATCH * counted


def test_the_cheapest_order_that_an_engine_may_take_is_counted() -> None:
    dense = Convolution((64, 64, 3, 3), (64, 64, 1, 1), (1, 1), (1, 1), (1, 1))
    kernels_first = 9 * 36 * 64 * 64 + 64 * 64 * 9 * 56 * 56
    outputs_first = 36 * 64 * 64 * 4 + 9 * 36 * 64 * 4
    assert work.forward("auto", dense, 36, 56 * 56, 56 * 56) == kernels_first
    assert work.forward("auto", dense, 36, 4, 4) == outputs_first
    assert work.forward("mix_kernels", dense, 36, 4, 4) == 9 * 36 * 64 * 64 + 64 * 64 * 9 * 4
    depthwise = Convolution((64, 1, 3, 3), (64, 1, 1, 1), (1, 1), (1, 1), (1, 1), groups=64)
    assert work.forward("auto", depthwise, 36, 4, 4) == 9 * 36 * 64 + 64 * 9 * 4


def test_layers_on_the_meta_device_and_empty_batches_are_counted() -> None:
    for layer, shape in ((KWConv2d(8, 8, 3, padding=1), (8, 6, 6)), (KWLinear(8, 8), (5, 8))):
        share_warehouse([layer])
        totals = {}
        for device, batch in (("cpu", 2), ("meta", 2), ("cpu", 0)):
            layer.to_empty(device=device)
            with FlopCounterMode(display=False) as counter:
                layer(torch.ones(batch, *shape, device=device)).sum().backward()
            totals[device, batch] = counter.get_total_flops()
        assert totals["cpu", 2] == totals["meta", 2] > 0 == totals["cpu", 0]
