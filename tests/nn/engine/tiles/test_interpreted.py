"""The kernels of Triton: what they compute, interpreted on the CPU, and what a compiler makes of them for a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kw_lightning.nn.engine import Convolution, planner, workspace
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.tiles import activating, launches, pooling, walks

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs on Linux")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}


@pytest.mark.skipif(VERSION < (3, 7), reason="its interpreter cannot read numbers under NumPy from 2.5 on")
def test_output_and_gradients_equal_the_literal_forms() -> None:
    script = Path(__file__).with_name("interpreted_script.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KW_NATIVE": "0"}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 29
    for case, dtype, errors in lines:
        assert list(errors) == ["y", "x", "attention", "cells"], case  # each of its shape
        assert all(error < TOLERANCE[dtype] for error in errors.values()), (case, errors)


HOPPER, AMPERE = 227 * 1024, 163 * 1024


def test_without_a_compiler_other_paths_compute_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: fail())
    launches.missing.cache_clear()
    try:
        problem = Problem(Convolution((4, 4), (4, 4)).over_tokens(), 2, (3,), 5, torch.bfloat16, torch.device("cuda"))
        with workspace(2**28):  # which a GPU is not asked for
            survey = planner.survey(problem, "auto")
            planner.survey(problem._replace(batch=3), "auto")
    finally:
        launches.missing.cache_clear()
    reasons = {choice.path.name: choice.refusal for choice in survey}
    assert reasons["mix_kernels/triton"] == "Triton launches nothing here (Failed to find C compiler.)"
    assert survey[0].refusal is None
    assert [record.getMessage() for record in caplog.records] == [
        "Triton's kernels are not in use, dynamic layers are slower without: Failed to find C compiler."
    ]


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        devices.append(chosen.index)
        yield
        devices.pop()

    launched = []
    module = SimpleNamespace(kernel={(3,): lambda *_, **__: launched.append(devices[-1])})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        for index in (0, 1):
            launches.start("kernel", 3, torch.empty(2, device=f"cuda:{index}"), 5, module=module, BLOCK=2)
    assert launched == [0, 1]
    assert devices == [0]


@pytest.mark.parametrize("shared", [launches.SHARED, AMPERE, HOPPER])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("positions", [1, 49, 196, 3136])
def test_tiles_fit_in_the_memory_of_a_program(positions: int, itemsize: int, shared: int) -> None:
    for outputs, inputs in ((16, 16), (64, 64), (24, 144), (512, 512), (2048, 64)):
        for tiles, length in (
            (launches.convolving_tiles(positions, outputs, inputs, itemsize, shared), "inputs"),
            (launches.correlating_tiles(positions, outputs, inputs, itemsize, shared), "positions"),
        ):
            sides = tiles._asdict()
            summed = sides.pop(length)
            assert tiles.stages * summed * (sum(sides.values()) - tiles.warps - tiles.stages) * itemsize <= shared
            assert all(side >= 16 and side & (side - 1) == 0 for side in tiles[:3])


@pytest.mark.parametrize(
    "name",
    [
        *("convolve", "convolve turned", "convolve pointwise", "correlate", "correlate pointwise", "correlate whole"),
        *("depthwise convolve", "depthwise correlate"),
    ],
)
@pytest.mark.parametrize(
    ("capability", "memory", "product"),
    [(80, AMPERE, "mma.sync"), (90, HOPPER, "wgmma.mma_async"), (100, HOPPER, "tcgen05.mma")],
    ids=["80", "90", "100"],
)
def test_they_compile_to_wide_copies_without_spilling_registers(
    name: str, capability: int, memory: int, product: str, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from kw_lightning.nn.engine.tiles import depthwise, kernels

    ptxas = Path(get_ptxas(capability).path)  # the one that Triton writes for: it brings several, of unequal versions
    if not ptxas.exists():
        pytest.skip("this Triton brings no assembler")
    module = depthwise if "depthwise" in name else kernels
    kernel = module.correlate if "correlate" in name else module.convolve
    choose = launches.correlating_tiles if "correlate" in name else launches.convolving_tiles
    positions = 49 if "whole" in name else 3136
    tiles = launches.depthwise_tiles(64) if module is depthwise else choose(positions, 256, 256, 2, memory)
    fixed: dict[str, Any] = {
        "TURNED": name == "convolve turned",
        "WHOLE": name == "correlate whole",
        "POINTWISE": "pointwise" in name,
        "ALIGNED": 16,
        "EVEN": True,
        "in_cell": 256,
        "out_cell": 256,
        "M": tiles.positions,
        "N": tiles.outputs,
        "K": tiles.inputs,
        "PRECISION": "ieee",
    }
    types = dict.fromkeys(("x", "weights", "y", "gradient"), "*bf16")
    signature = {arg: "constexpr" if arg in fixed else types.get(arg, "i32") for arg in kernel.arg_names}
    constants = {(index,): fixed[arg] for index, arg in enumerate(kernel.arg_names) if arg in fixed}
    read = (
        "inputs",
        "outputs",
        "channels",
        "cell",
        "group",
        "in_group",
        "out_group",
        "tap_",
        "x_sample",
        "weights_sample",
        "y_sample",
        "gradient_sample",
    )
    sixteen = [["tt.divisibility", 16]]
    aligned = {(index,): sixteen for index, arg in enumerate(kernel.arg_names) if arg in types or arg.startswith(read)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if module is kernels:
        assert product in compiled.asm["ptx"]
        assert "cp.async.cg" in compiled.asm["ptx"]  # copies of 16 bytes
        assert "cp.async.ca" not in compiled.asm["ptx"]  # of less
        assert not re.search(r"ld\.global(?!\.v4)", compiled.asm["ptx"])
    else:
        assert "ld.global.v4.b32" in compiled.asm["ptx"]  # as wide
    assert spills(compiled, ptxas, tmp_path) == [("0", "0")]
    assert int(compiled.metadata.shared) <= memory


def spills(compiled: Any, ptxas: Path, folder: Path) -> list[tuple[str, str]]:
    """Return the bytes of registers that an assembler has stored to memory, and loaded, of every kernel."""
    assembly = folder / "kernel.ptx"
    assembly.write_text(compiled.asm["ptx"])
    (architecture,) = re.findall(r"\.target (sm_\w+)", compiled.asm["ptx"])
    report = subprocess.run(
        [str(ptxas), "-v", "--gpu-name", architecture, str(assembly), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)


SMALL = {
    "weigh": {"COLUMNS": 256},
    "differentiate_weights": {"COLUMNS": 256},
    "normalise": {"GIVEN": False, "RUNNING": True, "ROWS": activating.ROWS, "COLUMNS": activating.COLUMNS},
    "differentiate_norm": {"GIVEN": False, "ROWS": activating.ROWS, "COLUMNS": activating.COLUMNS},
    "add_to_positions": {"BLOCK": pooling.BLOCK},
}
TYPES = {
    "x": "*bf16",
    "y": "*bf16",
    "alpha": "*bf16",
    "initial": "*i64",
    **dict.fromkeys(("epsilon", "momentum", "unbiased", "share", "limit"), "fp32"),
    **dict.fromkeys(("batch", "width", "size", "channels", "programs", "length", "mixtures", "cells"), "i32"),
    "row_length": "i32",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_small_ones_compile_for_hopper_without_spilling_registers(name: str, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from kw_lightning.nn.engine.tiles import kernels

    kernel, fixed = getattr(kernels, name), SMALL[name]
    signature = {arg: "constexpr" if arg in fixed else TYPES.get(arg, "*fp32") for arg in kernel.arg_names}
    constants = {(kernel.arg_names.index(arg),): value for arg, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptxas = Path(get_ptxas(90).path)
    if not ptxas.exists():
        pytest.skip("this Triton brings no assembler")
    assert spills(compiled, ptxas, tmp_path) == [("0", "0")]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_the_walks_of_the_gradient_are_those_of_the_convolution_turned(
    stride: int, dilation: int, padding: int
) -> None:
    convolution = Convolution((1, 1, 3), (1, 1, 1), (stride,), (padding,), (dilation,))
    size = 11

    def pairs(side: walks.Side, length: int) -> set[tuple[int, int, int]]:
        """Return (written, read, position of the kernel)."""
        return {
            (p * side.place + side.begin, p * side.scale + side.first + tap * side.step, k)
            for p in range(side.positions)
            for tap in range(side.taps)
            if 0 <= p * side.scale + side.first + tap * side.step < length
            for k in [side.kernel_first + tap * side.kernel_step]
        }

    (outputs,) = convolution.output_size((size,))
    forward = pairs(walks.forward_walk(convolution, (size,))[1], size)
    backward = [walk[1] for walk in walks.backward_walks(convolution, (size,))]
    assert {(x, y, k) for y, x, k in forward} == set().union(*(pairs(side, outputs) for side in backward))
    written = [p * side.place + side.begin for side in backward for p in range(side.positions)]
    assert sorted(written) == list(range(size))
