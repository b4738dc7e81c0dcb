"""Paths on a GPU, as far as they can be followed without one: operators on imaginary tensors, and what they ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from geometries import LAYERS, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kw_lightning.nn.engine import computing, planner
from kw_lightning.nn.engine.paths import PATHS, Path

# It launches its kernels on memory that there has to be.
UNFOLLOWED = "mix_kernels/triton"
FOLLOWED = [
    (name, path)
    for name in ("resnet18 layer2.0.conv1", "resnet18 layer4", "mobilenetv2 project", "mobilenetv2 depthwise")
    for path in PATHS
    if path.name != UNFOLLOWED
    and (path.refusal(on_a_gpu := problem(name, 4, dtype=torch.bfloat16, device="cuda")) or path.unsuited(on_a_gpu))
    is None
]
CHOSEN = ("resnet18 layer1", "resnet50 layer3 expand", *dict(FOLLOWED))
NO_WORK = {"empty", "new_empty", "empty_like", "_unsafe_view", "detach", "lift_fresh"}


class Operators(TorchDispatchMode):
    """Counts the operators that work, and the elements that they read and write; notes the types of products."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.elements = 0
        self.product_types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace == "prim" or name in NO_WORK:
            return result
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in (*operands, *written)), name
        read = operands[1:] if name in ("copy_", "zero_", "fill_") else operands
        self.launches += 1
        self.elements += sum(map(in_memory, (*read, *written)))
        if name in ("mm", "bmm", "addmm_", "baddbmm_", "convolution", "convolution_backward"):
            self.product_types |= {tensor.dtype for tensor in operands}
        return result


def in_memory(tensor: Tensor) -> int:
    """Return the elements of a tensor that are not repetitions of each other."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride != 0) if tensor.numel() else 0


def follow(name: str, path: Path, batch: int, dtype: torch.dtype) -> tuple[Operators, Operators]:
    """Return the operators of the forward and of the backward pass."""
    geometry, _, (side, _), cells, *_ = problem(name, batch)
    mixtures = math.prod(geometry.kernel_shape) // math.prod(geometry.cell_shape)
    with FakeTensorMode():
        x = torch.empty(batch, geometry.kernel_shape[1] * geometry.groups, side, side, device="cuda", dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        attention = torch.empty(batch, mixtures, cells, device="cuda")
        stored = torch.empty(cells, *geometry.cell_shape, device="cuda")
        with Operators() as forward:
            y = computing.forward(x, attention, stored, geometry, path)
        with Operators() as backward:
            found = computing.backward(y, x, attention, stored, geometry, path, [True] * 3)
        assert (y.device.type, y.dtype) == ("cuda", dtype)
        assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in (x, attention, stored)]
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "path"), FOLLOWED, ids=lambda value: getattr(value, "name", value))
def test_everything_stays_on_the_gpu_in_the_type_of_the_input(name: str, path: Path, dtype: torch.dtype) -> None:
    for operators in follow(name, path, 4, dtype):  # which fails where a number would have to come to the CPU
        assert operators.product_types == {dtype}  # those of two bytes are products of the tensor cores


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("name", "path"), FOLLOWED, ids=lambda value: getattr(value, "name", value))
def test_the_load_is_that_of_the_operators(name: str, path: Path, batch: int) -> None:
    forward, _ = follow(name, path, batch, torch.bfloat16)
    load = path.load(problem(name, batch, dtype=torch.bfloat16, device="cuda"))
    assert load.calls / 2.5 - 4 <= forward.launches <= load.calls * 2.5 + 4
    assert load.elements / 2 <= forward.elements <= load.elements * 2


@pytest.mark.parametrize("batch", [1, 64, 256])
@pytest.mark.parametrize("name", CHOSEN)
def test_the_chosen_path_has_few_launches(name: str, batch: int) -> None:
    for backward in (False, True):
        posed = problem(name, batch, dtype=torch.bfloat16, device="cuda", backward=backward)
        ranked = [path for path in planner.rank(posed, "auto") if path.name != UNFOLLOWED]
        assert follow(name, ranked[0], batch, torch.bfloat16)[backward].launches < 128


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_has_a_path(name: str) -> None:
    assert planner.rank(problem(name, 0, dtype=torch.bfloat16, device="cuda"), "auto")
    assert planner.rank(problem(name, 0), "auto")
