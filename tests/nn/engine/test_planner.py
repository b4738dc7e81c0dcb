"""The planner: what it picks, why, and that timing is remembered."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import LAYERS, convolution

from kw_lightning.builder import convert
from kw_lightning.nn.engine import ENGINES, Convolution, autotune, costs, dynamic_convolution, native, paths, planner

CPU = torch.device("cpu")


def multiply_adds(path: str, name: str, batch: int, side: int, backward: bool) -> int:
    """Count a pass by hand, from the orders of contraction alone.

    Backwards, kernels are mixed anew, and both gradients of the mixture and of the product are taken; where inputs or
    outputs are mixed, next to nothing is.
    """
    geometry, cells = convolution(name), LAYERS[name][6]
    kernel, cell = math.prod(geometry.kernel_shape), math.prod(geometry.cell_shape)
    _, out_groups, in_groups = geometry.grid
    positions = math.prod(geometry.output_size((side, side)))
    if path in ("mix_inputs", "fused_inputs"):
        return batch * cells * cell * out_groups * positions * (2 if backward else 1)
    if path == "mix_outputs":
        return batch * cells * cell * in_groups * side * side * (2 if backward else 1)
    if path == "winograd":
        kernel, positions = kernel * 16 // 9, math.ceil(geometry.output_size((side, side))[0] / 2) ** 2
    # On a map smaller than the kernel's reach, these leave out positions that read only padding.
    reach = path in ("products", "fused") and geometry.kernel_shape[2] == 3
    live = min(1.0, (2 * side - 1) ** 2 / 9) if reach else 1.0
    return int(batch * kernel * live * (3 * cells + 2 * positions if backward else cells + positions))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(16, 224), (1, 224), (64, 32), (3, 96), (16, 64)])
@pytest.mark.parametrize("name", LAYERS)
def test_work_is_near_the_least(name: str, batch: int, size: int, backward: bool) -> None:
    side = math.ceil(LAYERS[name][3] * size / 224)
    ranked = planner.rank(convolution(name), batch, (side, side), LAYERS[name][6], torch.float32, CPU, "auto", backward)
    # Not of Winograd's form, whose multiply-adds are fewer but in many small products, nor of PyTorch's products, which
    # reach about two thirds of the compiled ones' speed; those alone move kernels through memory as well.
    least = min(
        multiply_adds(path, name, batch, side, backward)
        for path in ranked
        if path in (("fused", "fused_inputs") if native.available() and LAYERS[name][7] == 1 else ranked)
    )
    # Of few samples, reading all cells takes as long as working on them.
    limit = (1.25 if batch > 3 else 1.5) if native.available() else 3.0
    assert multiply_adds(ranked[0], name, batch, side, backward) <= limit * least


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize(
    ("name", "batch", "side", "expected"),
    [
        ("resnet18 layer1", 16, 56, {"winograd"}),
        ("resnet18 layer2.0.conv1", 16, 56, {"fused"}),
        ("resnet18 layer4", 16, 7, {"fused"}),
        ("resnet18 layer3", 64, 2, {"fused_inputs", "mix_outputs"}),
        ("resnet18 layer4", 64, 1, {"fused_inputs", "mix_inputs", "mix_outputs"}),
        ("convnext depthwise", 16, 56, {"depthwise"}),
        ("resnet50 layer1 expand", 16, 56, {"fused"}),
    ],
)
def test_shapes_get_the_path_measured_fastest(name: str, batch: int, side: int, expected: set[str]) -> None:
    ranked = planner.rank(convolution(name), batch, (side, side), LAYERS[name][6], torch.float32, CPU, "auto", False)
    assert ranked[0] in expected


@pytest.mark.parametrize(
    ("name", "batch", "side", "expected"),
    [
        ("resnet18 layer1", 16, 56, {"per_sample", "grouped"}),
        ("resnet18 layer4", 64, 1, {"mix_inputs", "mix_outputs"}),
        ("convnext depthwise", 16, 56, {"grouped"}),
    ],
)
def test_other_types_get_paths_of_pytorchs_products(name: str, batch: int, side: int, expected: set[str]) -> None:
    ranked = planner.rank(convolution(name), batch, (side, side), LAYERS[name][6], torch.float64, CPU, "auto", False)
    assert ranked[0] in expected
    assert not {"fused", "winograd", "fused_inputs", "depthwise"} & set(ranked)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_engine_names_only_paths_that_can(name: str, engine: str) -> None:
    geometry = convolution(name)
    for dtype, device in ((torch.float32, CPU), (torch.float64, CPU), (torch.bfloat16, torch.device("cuda"))):
        if planner.refusal(engine, geometry) is not None:
            assert geometry.groups > 1
            assert engine in ("mix_inputs", "mix_outputs")
            with pytest.raises(ValueError, match=r"allowed: auto, autotune, mix_kernels, reference$"):
                planner.rank(geometry, 2, (8, 8), LAYERS[name][6], dtype, device, engine, False)
            continue
        ranked = planner.rank(geometry, 2, (8, 8), LAYERS[name][6], dtype, device, engine, False)
        assert ranked
        assert all(paths.refusal(path, geometry, dtype, device) is None for path in ranked)
        if engine in ("mix_inputs", "mix_outputs"):
            assert all(path.endswith(engine.removeprefix("mix_")) for path in ranked)


def test_autotune_times_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_memory", {})
    timed: list[str] = []
    elapsed = autotune.elapsed

    def count(function: Callable[[], object], device: Any) -> float:
        timed.append("")
        return elapsed(function, device)

    monkeypatch.setattr(autotune, "elapsed", count)
    geometry = Convolution((4, 4, 3, 3), (4, 4, 1, 1), (1, 1), (1, 1), (1, 1))
    tensors = [torch.randn(s) for s in ((2, 4, 5, 5), (2, 9, 3), (3, 4, 4, 1, 1))]
    expected = dynamic_convolution(*tensors, geometry, "reference")
    torch.testing.assert_close(dynamic_convolution(*tensors, geometry, "autotune"), expected)
    first = len(timed)
    assert first >= len(paths.PATHS)
    stored = json.loads(autotune.cache_file().read_text())
    assert set(stored.values()) <= set(paths.PATHS)
    assert len(stored) == 1
    dynamic_convolution(*tensors, geometry, "autotune")
    monkeypatch.setattr(autotune, "_memory", {})  # as in another process: from the file
    dynamic_convolution(*tensors, geometry, "autotune")
    assert len(timed) == first


def test_the_study_fits_units_that_are_not_negative() -> None:
    study = runpy.run_path(str(Path(__file__).parents[3] / "recipes/studies/engine_costs.py"))
    torch.manual_seed(0)
    rows = torch.rand(30, 4, dtype=torch.float64)
    for units in ([2.0, 0.5, 0.0, 3.0], [0.0, 0.0, 1.0, 0.0]):
        goal = torch.tensor(units, dtype=torch.float64)
        torch.testing.assert_close(study["least_squares"](rows, rows @ goal), goal, rtol=1e-6, atol=1e-9)
    found = study["least_squares"](rows, rows @ torch.tensor([2.0, -0.1, 1.0, 1.0], dtype=torch.float64))
    assert (found >= 0).all()
    found = list(study["problems"]())
    assert len(found) > 100
    geometry, batch, size, cells = min(found, key=lambda problem: problem[1] * math.prod(problem[2]))
    x, stored = torch.randn(batch, geometry.kernel_shape[1], *size), torch.randn(cells, *geometry.cell_shape)
    attention = torch.randn(batch, math.prod(geometry.kernel_shape) // math.prod(geometry.cell_shape), cells)
    for backward in (False, True):
        timed = study["timed"](geometry, (x, attention, stored), backward, 1)
        assert len(timed) > 1
        assert timed.keys() <= costs.SECONDS.keys()


@pytest.mark.parametrize("content", ["", "[1]", '{"forward": 3', '{"forward x": "nonsense"}', "\0\xff", "[" * 100_000])
def test_a_damaged_autotune_file_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_memory", {})
    autotune.cache_file().write_bytes(content.encode("latin1"))
    tune_a_layer()
    assert len(json.loads(autotune.cache_file().read_text())) == 1


def tune_a_layer() -> None:
    geometry = Convolution((4, 4, 1, 1), (4, 4, 1, 1), (1, 1), (0, 0), (1, 1))
    tensors = [torch.randn(s) for s in ((2, 4, 2, 2), (2, 1, 3), (3, 4, 4, 1, 1))]
    y = dynamic_convolution(*tensors, geometry, "autotune")
    torch.testing.assert_close(y, dynamic_convolution(*tensors, geometry, "reference"))


@pytest.mark.parametrize("exposed", ["file", "folder"])
def test_choices_that_others_can_have_written_are_not_read(
    exposed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_memory", {})
    tune_a_layer()
    file = autotune.cache_file()
    ((key, path),) = json.loads(file.read_text()).items()
    other = next(one for one in paths.PATHS if one != path and not one.startswith("depth"))
    file.write_text(json.dumps({key: other, "of a stranger": "products"}))
    (file if exposed == "file" else file.parent).chmod(0o777)
    monkeypatch.setattr(autotune, "_memory", {})
    tune_a_layer()
    assert list(autotune._memory) == [key]
    (line,) = {record.getMessage() for record in caplog.records}
    assert "can be written by others" in line
    assert (json.loads(file.read_text()).keys() == {key}) == (exposed == "file")


def test_choices_are_timed_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(autotune, "_memory", {})
    tune_a_layer()
    assert len(caplog.records) == 1
    assert "Not a directory" in caplog.text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recipe_sets_the_engine_of_its_layers(engine: str) -> None:
    recipe = {"kw": 1, "name": "n", "engine": engine, "warehouses": {"all": {"layers": ["0", "1"]}}}
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3))
    convert(net, recipe)
    assert [layer.engine for layer in net] == [engine, engine]
