"""Mixing along the attention's rank against the literal form, and the mixed bases that evaluation keeps."""

from __future__ import annotations

import copy
import gc
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import LAYERS
from geometries import problem as posed
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, set_temperature, share_warehouse
from kw_lightning.nn.engine import (
    AttentionFactors,
    Convolution,
    autotune,
    bases,
    computing,
    dynamic_convolution,
    kept,
    native,
    planner,
    reference,
)
from kw_lightning.nn.engine.kept import Use
from kw_lightning.nn.engine.native import blocking, forms
from kw_lightning.nn.engine.paths import find_path
from kw_lightning.nn.engine.paths.mix_kernels.along_rank import AlongRank
from kw_lightning.nn.engine.paths.mix_kernels.winograd_along_rank import WinogradAlongRank
from kw_lightning.nn.engine.problem import Problem

compiled = pytest.mark.skipif(not native.available(), reason="needs a C compiler")

# Kernel, cell, stride, padding, groups, map, cells, width: several groups both ways, narrow cells, dead taps, a linear.
GEOMETRIES = {
    "groups both ways": ((40, 24, 3, 3), (20, 12, 1, 1), 2, 1, 1, (7, 6), 19, 17),
    "dead taps": ((16, 8, 3, 3), (16, 8, 1, 1), 1, 1, 1, (1, 1), 40, 4),
    "pointwise": ((20, 64, 1, 1), (10, 32, 1, 1), 1, 0, 1, (4, 4), 300, 3),
    "whole cells": ((8, 4, 3, 3), (4, 4, 3, 3), 1, 1, 1, (5, 5), 6, 3),
    "grouped": ((8, 2, 3, 3), (4, 2, 1, 1), 1, 1, 2, (5, 5), 6, 3),
}


def make(name: str, batch: int, tau: float) -> tuple[Convolution, list[Tensor], Tensor, Tensor]:
    """Return (geometry, [x, hidden, weight, bias, cells], τ, initial cells) in float64."""
    kernel, cell, stride, padding, groups, size, cells, width = GEOMETRIES[name]
    convolution = Convolution(kernel, cell, (stride,) * 2, (padding,) * 2, (1, 1), groups)
    mixtures = math.prod(kernel) // math.prod(cell)
    generator = torch.Generator().manual_seed(0)
    columns = mixtures * (cells + 1)
    shapes = ((batch, kernel[1] * groups, *size), (batch, width), (columns, width), (columns,), (cells, *cell))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    initial = torch.randint(0, cells + 1, (mixtures,), generator=generator)
    return convolution, tensors, torch.tensor(tau, dtype=torch.float64), initial


def convolve(tensors: list[Tensor], tau: Tensor, initial: Tensor, convolution: Convolution) -> Tensor:
    x, hidden, weight, bias, cells = tensors
    factors = AttentionFactors(hidden, weight, bias, tau.to(hidden.dtype), initial)
    return dynamic_convolution(x, factors, cells, convolution)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_output_and_gradients_are_those_of_the_literal_form(name: str, dtype: torch.dtype) -> None:
    for batch, tau in ((0, 0.3), (1, 0.0), (2, 1.0), (33, 0.3)):
        convolution, tensors, temperature, initial = make(name, batch, tau)
        exact = [tensor.clone().requires_grad_() for tensor in tensors]
        x, hidden, weight, bias, cells = exact
        alpha = AttentionFactors(hidden, weight, bias, temperature, initial).alpha()
        expected = reference.convolve(x, alpha, cells, convolution)
        gradient = torch.randn_like(expected)
        values = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with bases("always"):
            y = convolve(values, temperature, initial, convolution)
            found = torch.autograd.grad(y, values, gradient.to(dtype))
        wanted = torch.autograd.grad(expected, exact, gradient)
        for one, other in zip((y, *found), (expected, *wanted), strict=True):
            scale = other.abs().max().clamp_min(1e-3) if batch else 1
            torch.testing.assert_close(
                one.double() / scale, other / scale, rtol=0, atol=1e-8 if dtype == torch.float64 else 1e-4
            )


def test_an_unbatched_input_and_channels_last_give_the_same() -> None:
    layer = evaluated()
    x = torch.randn(3, 16, 6, 6)
    expected = layer(x)
    with bases("always"):
        torch.testing.assert_close(layer(x[1]), expected[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_needed_are_made() -> None:
    convolution, tensors, tau, initial = make("groups both ways", 2, 0.3)
    for wanted in (0, 2, 4):
        values = [tensor.float() for tensor in tensors]
        values[wanted].requires_grad_()
        found = []
        for way in ("always", "never"):
            with bases(way):
                found += torch.autograd.grad(convolve(values, tau, initial, convolution).sin().sum(), values[wanted])
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def evaluated(tau: float = 0.2) -> KWConv2d:
    torch.manual_seed(0)
    layer = KWConv2d(16, 16, 3, padding=1)
    share_warehouse([layer], budget=8)
    set_temperature(layer, tau)
    return layer.eval()


def double_in_place(layer: KWConv2d) -> None:
    with torch.no_grad():
        layer.warehouse.cells.mul_(2)


def double_past_the_version(layer: KWConv2d) -> None:
    layer.warehouse.cells.data.copy_(2 * layer.warehouse.cells.data)


def swap_two_cells_past_the_version(layer: KWConv2d) -> None:
    layer.warehouse.cells.data.copy_(layer.warehouse.cells.data.flip(0))


def load_another_state(layer: KWConv2d) -> None:
    layer.load_state_dict(
        {name: tensor + 0.5 for name, tensor in layer.state_dict().items() if name != "x"}, strict=True
    )


def average(layer: KWConv2d) -> None:
    """Swap in an average as Lightning's WeightAveraging does."""
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=False)
    averaged.module.attention.expand.weight.data.mul_(-1)
    for own, other in zip(layer.parameters(), averaged.module.parameters(), strict=True):
        held = other.data.clone()
        other.data.copy_(own.data)
        own.data.copy_(held)


def set_another_temperature(layer: KWConv2d) -> None:
    set_temperature(layer, 0.7)


def take_another_bias(layer: KWConv2d) -> None:
    layer.attention.expand.bias = nn.Parameter(layer.attention.expand.bias + 1)


def there_and_back(layer: KWConv2d) -> None:
    layer.double()
    layer.float()
    layer.warehouse.cells.data.neg_()


CHANGES = (
    double_in_place,
    double_past_the_version,
    swap_two_cells_past_the_version,
    load_another_state,
    average,
    set_another_temperature,
    take_another_bias,
    there_and_back,
)


@compiled
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_bases_are_never_stale(change: Callable[[KWConv2d], None], mode: Callable[[], torch.no_grad]) -> None:
    layer, x = evaluated(), torch.randn(4, 16, 6, 6)
    with mode(), bases("always"):
        first = layer(x)
        assert kept.kept_bytes() > 0
        assert torch.equal(layer(x), first)  # from what was kept
    change(layer)
    with mode():
        with bases("always"):
            found = layer(x)
        with bases("never"):
            expected = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, first, rtol=1e-3, atol=1e-3)


@compiled
def test_bases_are_mixed_once_while_nothing_changes_and_anew_for_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = evaluated()
    filled: list[bool] = []
    real = native.forward_by_bases

    def forward(*arguments: object) -> None:
        filled.append(arguments[7].blocks is not None)
        real(*arguments)

    monkeypatch.setattr(native, "forward_by_bases", forward)
    with torch.no_grad(), bases("always"):
        for size in (6, 6, 7, 1, 1):  # at 1×1 one tap is live
            x = torch.randn(2, 16, size, size)
            y = layer(x)
            with bases("never"):
                torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-4)
    assert filled == [False, True, True, False, True]


@compiled
@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_that_share_kept_bases_mix_them_once(count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for attempt in range(10):
            torch.manual_seed(attempt)
            layer = KWConv2d(16, 16, 3, padding=1)
            share_warehouse([layer], budget=64)  # more cells than are mixed at a time
            x = torch.randn(6, 16, 6, 6)
            with torch.no_grad(), bases("never"):
                expected = layer.eval()(x)
            with torch.no_grad(), bases("always"):
                for _ in range(2):
                    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@compiled
def test_kept_bases_go_with_their_layer_with_training_and_over_the_bound() -> None:
    gc.collect()
    before = kept.kept_bytes()
    layer, x = evaluated(), torch.randn(2, 16, 6, 6)
    with torch.no_grad(), bases("always", keep=100):
        layer(x)
        assert kept.kept_bytes() == before
    with torch.no_grad(), bases("always"):
        layer(x)
        assert kept.kept_bytes() > before
        twin = copy.deepcopy(layer)
        double_in_place(twin)
        torch.testing.assert_close(twin(x) - twin.bias.view(-1, 1, 1), 2 * (layer(x) - layer.bias.view(-1, 1, 1)))
    with bases("always"):
        layer.train()(x)
    with torch.no_grad(), bases("always"):
        layer.eval()(x)
    del layer, twin
    gc.collect()
    assert kept.kept_bytes() == before


@compiled
def test_bases_that_save_most_a_byte_are_kept_where_there_is_no_room_for_all() -> None:
    gc.collect()
    before = kept.kept_bytes()
    torch.manual_seed(0)
    few, many = KWConv2d(16, 16, 3, padding=1), KWConv2d(16, 16, 3, padding=1)  # equal bytes
    share_warehouse([few], name="few", budget=8)
    share_warehouse([many], name="many", budget=64)
    x = torch.randn(2, 16, 6, 6)
    size = 4 * 9 * 18 * 16 * 16

    def is_kept(layer: KWConv2d) -> bool:
        return layer.attention.expand.weight in kept._entries

    with torch.no_grad():
        with bases("always", keep=before + size):
            few.eval()(x)
            assert is_kept(few)
            for _ in range(2):
                many.eval()(x)
                assert (is_kept(few), is_kept(many)) == (False, True)
                few(x)  # what saves less does not come back
            with bases("never"):
                expected = few(x), many(x)
            torch.testing.assert_close((few(x), many(x)), expected, rtol=1e-3, atol=1e-4)
        with bases("always", keep=before + 2 * size):
            few(x)
            assert (is_kept(few), is_kept(many)) == (True, True)
            assert kept.kept_bytes() == before + 2 * size


@compiled
def test_two_threads_that_evaluate_one_layer_agree() -> None:
    layer, x = evaluated(), torch.randn(4, 16, 6, 6)
    with torch.no_grad(), bases("never"):
        expected = layer(x)
    results: list[Tensor] = []

    def evaluate() -> None:
        with torch.no_grad():
            results.extend(layer(x) for _ in range(20))

    with bases("always"):
        threads = [threading.Thread(target=evaluate) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 40
    for y in results:
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def chosen(problem: Problem, engine: str = "auto") -> str:
    return planner.rank(problem, engine)[0].name


@compiled
def test_it_is_chosen_as_any_other_path_where_it_should_be_fastest() -> None:
    many = posed("resnet18 layer3", 128, 64)._replace(cells=188, width=16)
    assert chosen(many) == AlongRank.name
    assert chosen(many._replace(backward=True), "mix_kernels") == AlongRank.name
    assert chosen(many._replace(batch=1)) != AlongRank.name
    assert not find_path(
        chosen(many._replace(batch=1, kept=True))
    ).of_bases  # reading 153 bases takes as long as 188 cells
    assert find_path(chosen(many._replace(batch=2, kept=True))).of_bases
    assert find_path(chosen(many._replace(batch=1, cells=552, kept=True))).of_bases
    several = posed("resnet18 layer4.0.conv1", 1, 224)._replace(cells=188, width=16, kept=True)
    assert chosen(several) != AlongRank.name  # its bases are read from the memory for one sample
    assert chosen(several._replace(batch=4)) == AlongRank.name
    assert chosen(posed("resnet18 layer4", 16, 224)._replace(cells=108, width=32)) != AlongRank.name
    for problem, reason in (
        (many._replace(width=None), "the factors of the attention are not at hand"),
        (many._replace(dtype=torch.float64), "it computes in float32 on a CPU, not in float64 on cpu"),
        (posed("convnext depthwise", 64)._replace(width=16), "know no groups"),
    ):
        found = [choice for choice in planner.survey(problem, "auto") if choice.path.of_bases]
        assert [choice.path.name for choice in found] == [AlongRank.name, WinogradAlongRank.name]
        assert all((choice.refusal or "").endswith(reason) for choice in found)
    assert AlongRank.name not in [path.name for path in planner.rank(many, "mix_outputs")]


@compiled
def test_kept_bases_are_used_in_winograds_form_on_large_maps_and_are_the_same_on_small_ones() -> None:
    large = posed("resnet18 layer2", 32, 224)._replace(cells=188, width=16, kept=True)
    assert chosen(large) == WinogradAlongRank.name
    assert chosen(large._replace(kept=False)) not in (AlongRank.name, WinogradAlongRank.name)
    convolution, tensors, temperature, initial = make("dead taps", 2, 0.3)
    x, hidden, weight, bias, cells = (tensor.float() for tensor in tensors)
    factors = AttentionFactors(hidden, weight, bias, temperature.float(), initial, lasting=True)
    before = kept.kept_bytes()
    for side in (40, 4):
        x = torch.randn(*x.shape[:2], side, side)
        expected = computing.forward(x, factors, cells, convolution, AlongRank())
        held = kept.kept_bytes()
        found = computing.forward(x, factors, cells, convolution, WinogradAlongRank())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert kept.kept_bytes() == held > before


@compiled
@pytest.mark.parametrize("path", [AlongRank(), WinogradAlongRank()])
@pytest.mark.parametrize("lasting", [False, True])
def test_kernels_mixed_of_all_blocks_of_bases_equal_the_literal_form(
    path: AlongRank, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "BLOCK_BYTES", 1)  # the fewest depths, and several blocks
    forms.describe.cache_clear()
    convolution, tensors, temperature, initial = make("dead taps", 3, 0.3)
    _, hidden, weight, bias, cells = (tensor.float() for tensor in tensors)
    factors = AttentionFactors(hidden, weight, bias, temperature.float(), initial, lasting)
    x = torch.randn(3, 8, 21, 22)
    expected = reference.convolve(x, factors.alpha(), cells, convolution)
    for _ in range(2):  # kept bases are mixed once
        y = computing.forward(x, factors, cells, convolution, path)
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    told = forms.describe(
        convolution, (21, 22), 3, len(cells), 5, path.form, False, torch.get_num_threads(), 6 * 2**20, lasting
    )[1]
    assert told.block_depths < told.kernel_depths == told.depths
    forms.describe.cache_clear()


@compiled
@pytest.mark.parametrize(("use", "runs"), [("never", False), ("always", True), ("auto", False)])
def test_the_context_overrides_the_choice(use: Use, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = native.forward_by_bases
    monkeypatch.setattr(native, "forward_by_bases", lambda *arguments: (ran.append(""), real(*arguments)))
    layer = evaluated().train()
    with bases(use):
        layer(torch.randn(1, 16, 6, 6))
    assert bool(ran) == runs


@compiled
def test_autotune_times_it_and_remembers_it_for_layers_with_factors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_memory", {})
    timed: list[str] = []
    real = computing.forward

    def forward(*arguments: Any) -> Tensor:
        timed.append(arguments[4].name)
        return real(*arguments)

    monkeypatch.setattr(computing, "forward", forward)
    layer, x = evaluated(), torch.randn(4, 16, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        layer.engine = "autotune"
        for _ in range(2):
            torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-4)
        layer.train()(x)
    assert AlongRank.name in timed
    keys = list(autotune._memory)
    assert len(keys) == 2
    assert ["kept" in key.split() for key in keys] == [True, False]
    assert all("width 16" in key for key in keys)


def test_more_cells_cost_nothing_beside_their_bases_once() -> None:
    path = AlongRank()
    for name in LAYERS:
        few = posed(name, 64)._replace(width=16, kept=True)
        if few.convolution.groups == 1:
            many = few._replace(cells=64 * few.cells)
            assert path.load(few).mixing == path.load(many).mixing
            without = [problem._replace(width=None) for problem in (few, many)]
            small, large = (planner.survey(problem, "auto")[0].seconds for problem in without)
            assert large > small


def test_a_use_or_a_bound_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match='"sometimes"'), bases("sometimes"):
        pass
    with pytest.raises(ValueError, match="-1"), bases(keep=-1):
        pass
