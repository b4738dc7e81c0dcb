"""Every path of the engine against the literal form: output and all gradients, over random geometries."""

from __future__ import annotations

import math
from pathlib import Path as FilePath

import pytest
import torch
from geometries import suited
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kw_lightning.nn.engine import (
    AttentionFactors,
    Convolution,
    computing,
    dynamic_convolution,
    dynamic_linear,
    native,
    paths,
    planner,
    reference,
    workspace,
)
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.orders import ORDERS
from kw_lightning.nn.engine.paths import PATHS, Path, order_of
from kw_lightning.nn.engine.problem import Operands, Problem

CPU = torch.device("cpu")
GPU = torch.device("cuda")
WIDTH = 3  # of the attention's hidden layer
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 6e-3,
}  # relative to the largest number


def refusal(path: Path, convolution: Convolution, dtype: torch.dtype, device: torch.device) -> str | None:
    return path.refusal(Problem(convolution, 2, (5,) * convolution.dimensions, 3, dtype, device, width=WIDTH))


def type_of(path: Path, convolution: Convolution) -> torch.dtype:
    """Return the most precise type in which a path computes here; skip a test of a path that there is not."""
    for dtype in (torch.float64, torch.float32):
        if refusal(path, convolution, dtype, CPU) is None:
            return dtype
    pytest.skip(f"{path.name} needs a C compiler and a convolution that it can compute")


@st.composite
def problems(draw: st.DrawFn, *, groups: bool = True) -> tuple[Convolution, tuple[int, ...], int, int]:
    """Draw (geometry, input size, batch, cells)."""
    dimensions = draw(st.integers(1, 3))

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, stride, dilation = sides(1, 3), sides(1, 3), sides(1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
    group = draw(st.sampled_from([1, 1, 2, 4])) if groups else 1
    co, ci = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    out_groups, in_groups = draw(st.integers(1, 3)) * group, draw(st.integers(1, 2))
    cell = (1,) * dimensions if draw(st.booleans()) else kernel
    convolution = Convolution(
        (co * out_groups, ci * in_groups, *kernel), (co, ci, *cell), stride, padding, dilation, group
    )
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(max(n, 1) + draw(st.integers(0, 4)) for n in least)
    return convolution, size, draw(st.integers(1, 3)), draw(st.integers(1, 5))


def make_tensors(
    problem: tuple[Convolution, tuple[int, ...], int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    convolution, size, batch, cells = problem
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, convolution.kernel_shape[1] * convolution.groups, *size),
        (batch, mixtures_of(convolution), cells),
        (cells, *convolution.cell_shape),
    )
    x, attention, stored = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, attention, stored


def mixtures_of(convolution: Convolution) -> int:
    return math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)


def make_factors(convolution: Convolution, batch: int, cells: int, dtype: torch.dtype) -> AttentionFactors:
    """Return factors, half precision's in single as a layer has them; a mixture starts as the zero cell."""
    generator = torch.Generator().manual_seed(2)
    mixtures = mixtures_of(convolution)
    columns = mixtures * (cells + 1)
    shapes = (batch, WIDTH), (columns, WIDTH), (columns,)
    exact = torch.promote_types(dtype, torch.float32)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(exact) for s in shapes)
    initial = (torch.arange(mixtures) + cells) % (cells + 1)
    return AttentionFactors(hidden.relu(), weight, bias, torch.tensor(0.25, dtype=exact), initial)


def operands(
    path: Path, problem: tuple[Convolution, tuple[int, ...], int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | AttentionFactors, Tensor]:
    """Return x, α or the factors that the path needs, and E."""
    x, attention, cells = make_tensors(problem, dtype)
    factors = make_factors(problem[0], problem[2], problem[3], dtype) if path.of_bases else None
    return x, attention if factors is None else factors, cells


def alpha_of(attention: Tensor | AttentionFactors) -> Tensor:
    return attention if isinstance(attention, Tensor) else attention.alpha()


def of_factors(factors: AttentionFactors, device: torch.device) -> AttentionFactors:
    tensors = [tensor.to(device) for tensor in (factors.hidden, factors.weight, factors.bias)]
    return AttentionFactors(*tensors, factors.temperature.to(device), factors.initial.to(device))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-3))


def compare(
    problem: tuple[Convolution, tuple[int, ...], int, int], dtype: torch.dtype, device: torch.device = CPU
) -> set[str]:
    """Compare every path with the literal form in float64 and return the orders of those that there were."""
    convolution, _, batch, count = problem
    x, attention, cells = (tensor.to(device) for tensor in make_tensors(problem, dtype))
    factors = of_factors(make_factors(convolution, batch, count, dtype), device)
    able = [path for path in PATHS if refusal(path, convolution, dtype, device) is None]
    for handed, those in (
        (attention, [path for path in able if not path.of_bases]),
        (factors, [path for path in able if path.of_bases or path.name == "mix_kernels/grouped"]),
    ):
        parts = [handed] if isinstance(handed, Tensor) else [handed.hidden, handed.weight, handed.bias]
        exact = [tensor.double().clone().requires_grad_() for tensor in (x, *parts, cells)]
        alpha = exact[1]
        if not isinstance(handed, Tensor):
            alpha = AttentionFactors(*exact[1:4], handed.temperature.double(), handed.initial).alpha()
        expected = reference.convolve(exact[0], alpha, exact[-1], convolution)
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        wanted = torch.autograd.grad(expected, exact, gradient.double())
        for path in those:
            y = computing.forward(x, handed, cells, convolution, path)
            found = computing.backward(gradient, x, handed, cells, convolution, path, [True] * 3)
            assert y.dtype == dtype
            assert [one.dtype for one in found] == [one.dtype for one in (x, *parts, cells)]
            names = ("y", "x", "α", "E") if len(parts) == 1 else ("y", "x", "hidden", "weight", "bias", "E")
            for name, one, other in zip(names, (y, *found), (expected, *wanted), strict=True):
                assert error(one, other.detach()) < TOLERANCE[dtype], (path.name, name)
    return {order_of(path) for path in able}


@settings(max_examples=80)
@given(problems(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_every_path_equals_the_literal_form(
    problem: tuple[Convolution, tuple[int, ...], int, int], dtype: torch.dtype
) -> None:
    assert "mix_kernels" in compare(problem, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=80)
@given(problems(), st.sampled_from([torch.float64, torch.bfloat16, torch.float16]))
def test_every_path_equals_the_literal_form_on_a_gpu(
    problem: tuple[Convolution, tuple[int, ...], int, int], dtype: torch.dtype
) -> None:
    assert "mix_kernels" in compare(problem, dtype, GPU)


@settings(max_examples=25)
@given(problems(groups=False), st.integers(1, 4000))
def test_chunks_change_nothing(problem: tuple[Convolution, tuple[int, ...], int, int], limit: int) -> None:
    with workspace(limit):
        assert compare(problem, torch.float64) == set(ORDERS)


def test_many_narrow_cells_are_joined() -> None:
    convolution = Convolution((12, 12, 3, 3), (3, 4, 1, 1), (1, 1), (1, 1), (1, 1))
    assert compare((convolution, (5, 4), 3, 7), torch.float64) == set(ORDERS)


def test_wide_cells_are_taken_one_by_one() -> None:
    convolution = Convolution((4, 128, 3, 1), (2, 64, 1, 1), (2, 1), (1, 0), (1, 1))
    assert compare((convolution, (5, 4), 2, 3), torch.float64) == set(ORDERS)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_a_strided_kernel_of_one_position_are_computed_where_it_reads(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolution = Convolution((4, 6, 1, 1), (2, 3, 1, 1), (2, 3), (0, 0), (1, 1))
    assert compare((convolution, (5, 7), 2, 3), torch.float64) == set(ORDERS)
    path, seen = paths.find_path("mix_kernels/shifted"), []
    x, attention, cells = make_tensors((convolution, (5, 7), 2, 3), torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    inner = type(path).backward

    def backward(self: Path, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        together = operands.x.is_contiguous(memory_format=torch.channels_last)  # as cells lie
        seen.append((tuple(operands.x.shape[2:]), operands.convolution.stride, together))
        return inner(self, gradient, operands, needed)

    monkeypatch.setattr(type(path), "backward", backward)
    gradient = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    found, *_ = computing.backward(gradient, x, attention, cells, convolution, path, [True] * 3)
    assert seen == [((3, 3), (1, 1), True)]
    assert found.stride() == x.stride()
    assert not found[..., 1::2, :].any()
    assert found[..., ::2, ::3].all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_maps_smaller_than_the_kernel(size: tuple[int, int], stride: int) -> None:
    convolution = Convolution((4, 6, 3, 3), (2, 3, 1, 1), (stride, stride), (1, 1), (1, 1))
    assert compare((convolution, size, 2, 3), torch.float64) == set(ORDERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_that_read_nothing_but_padding(dtype: torch.dtype) -> None:
    convolution = Convolution((4, 6, 1, 2), (4, 6, 1, 1), (1, 1), (0, 1), (1, 2))
    assert compare((convolution, (1, 1), 2, 3), dtype) == set(ORDERS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_path_is_named_after_its_order_and_method_as_its_file_is(path: Path) -> None:
    assert type(path).__module__ == "kw_lightning.nn.engine.paths." + path.name.replace("/", ".")
    assert order_of(path) in ORDERS


def test_every_file_of_an_order_is_in_the_list() -> None:
    folder = FilePath(paths.__file__).parent
    files = {f"{file.parent.name}/{file.stem}" for order in ORDERS for file in (folder / order).glob("[!_]*.py")}
    assert files - {path.name for path in PATHS} == {"mix_inputs/order", "mix_outputs/order"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_of_the_input_is_kept(path: Path, kernel: int) -> None:
    convolution = Convolution((6, 4, kernel, kernel), (3, 4, 1, 1), (1, 1), (kernel // 2,) * 2, (1, 1))
    convolution = suited(path.name, convolution)
    dtype = type_of(path, convolution)
    x, attention, cells = operands(path, (convolution, (6, 5), 3, 3), dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    y = computing.forward(x, attention, cells, convolution, path)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, reference.convolve(x, alpha_of(attention), cells, convolution)) < (
        1e-12 if dtype == torch.float64 else 1e-5
    )
    found = computing.backward(y, x, attention, cells, convolution, path, [True, False, False])
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert not any(len(gradient) for gradient in found[1:])
    assert computing.forward(x.contiguous(), attention, cells, convolution, path).is_contiguous()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_each_gradient_alone_is_the_same(path: Path) -> None:
    convolution = Convolution(
        (6, 4, 3, 3), (3, 2, 1, 1), (1, 1) if path.name.endswith("winograd") else (2, 1), (1, 1), (1, 1)
    )
    convolution = suited(path.name, convolution)
    dtype = type_of(path, convolution)
    x, attention, cells = operands(path, (convolution, (6, 5), 3, 3), dtype)
    gradient = torch.randn_like(computing.forward(x, attention, cells, convolution, path))
    together = computing.backward(gradient, x, attention, cells, convolution, path, [True] * 3)
    for index in range(3):
        needed = [index == other for other in range(3)]
        alone = computing.backward(gradient, x, attention, cells, convolution, path, needed)
        wanted = [needed[0], *[needed[1]] * (len(together) - 2), needed[2]]
        for one, other, want in zip(alone, together, wanted, strict=True):
            assert error(one, other) < (1e-12 if dtype == torch.float64 else 1e-6) if want else len(one) == 0


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["mix_kernels/compiled", "mix_kernels/depthwise", "mix_kernels/by_group"])
def test_on_a_cpu_types_of_two_bytes_are_computed_in_single_precision(path: str, dtype: torch.dtype) -> None:
    convolution = suited(path, Convolution((16, 8, 3, 3), (8, 8, 1, 1), (1, 1), (1, 1), (1, 1)))
    x, attention, cells = make_tensors((convolution, (6, 5), 2, 30), torch.float32)
    x = x.to(dtype)
    (chosen, *_) = planner.rank(Problem.of(x, attention, cells, convolution), "mix_kernels")
    assert chosen.precision(dtype) == torch.float32
    y = computing.forward(x, attention, cells, convolution, chosen)
    exact = computing.forward(x.float(), attention, cells, convolution, chosen)
    assert torch.equal(y, exact.to(dtype))
    gradient = torch.randn_like(exact).to(dtype)
    found = computing.backward(gradient, x, attention, cells, convolution, chosen, [True] * 3)
    wanted = computing.backward(gradient.float(), x.float(), attention, cells, convolution, chosen, [True] * 3)
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32, torch.float32]
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(path: Path) -> None:
    convolution = suited(path.name, Convolution((6, 4, 3, 3), (3, 2, 1, 1), (1, 1), (1, 1), (1, 1)))
    x, attention, cells = make_tensors((convolution, (6, 5), 1, 3), type_of(path, convolution))
    y = computing.forward(x[:0], attention[:0], cells, convolution, path)
    assert y.shape == (0, convolution.kernel_shape[0], 6, 5)
    found = computing.backward(y, x[:0], attention[:0], cells, convolution, path, [True] * 3)
    assert found[0].shape == x[:0].shape
    assert found[2].shape == cells.shape
    assert found[2].abs().max() == 0


@pytest.mark.parametrize("engine", ["auto", "mix_kernels", "mix_outputs", "mix_inputs", "reference"])
def test_linear_layers_are_convolutions_over_tokens(engine: str) -> None:
    geometry = Convolution((6, 8), (3, 4))
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 8), (3, 4, 7), (7, 3, 4))]
    expected = reference.apply_linear(*tensors, geometry)
    found = dynamic_linear(*tensors, geometry, engine)
    assert error(found.detach(), expected.detach()) < 1e-12
    gradient = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, tensors, gradient), torch.autograd.grad(expected, tensors, gradient), strict=True
    )
    assert max(error(one, other) for one, other in pairs) < 1e-12


def test_attention_and_cells_of_higher_precision_get_their_gradients_in_it() -> None:
    convolution = Convolution((6, 4, 3, 3), (3, 4, 1, 1), (1, 1), (1, 1), (1, 1))
    x, attention, cells = make_tensors((convolution, (6, 5), 3, 3), torch.float32)
    x, attention, cells = x.bfloat16().requires_grad_(), attention.requires_grad_(), cells.requires_grad_()
    y = dynamic_convolution(x, attention, cells, convolution)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, attention.grad.dtype, cells.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_gradient_of_cells_is_added_to_that_of_other_layers(path: Path) -> None:
    convolution = suited(path.name, Convolution((6, 4, 3, 3), (3, 2, 1, 1), (1, 1), (1, 1), (1, 1)))
    dtype = type_of(path, convolution)
    x, attention, cells = operands(path, (convolution, (6, 5), 3, 3), dtype)
    gradient = torch.randn_like(computing.forward(x, attention, cells, convolution, path))
    *_, alone = computing.backward(gradient, x, attention, cells, convolution, path, [True] * 3)
    collected = torch.ones_like(cells)
    *others, left = computing.backward(gradient, x, attention, cells, convolution, path, [True] * 3, collected)
    assert len(others[0]) == len(x)
    assert len(left) == 0
    assert error(collected, 1 + alone) < (1e-12 if dtype == torch.float64 else 1e-6)
