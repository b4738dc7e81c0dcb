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
from geometries import LAYERS, problem

from kw_lightning.builder import convert
from kw_lightning.nn.engine import ENGINES, Convolution, autotune, dynamic_convolution, native, planner
from kw_lightning.nn.engine.costs import Fitted, Units, cpu_seconds
from kw_lightning.nn.engine.orders import ORDERS
from kw_lightning.nn.engine.paths import PATHS, find_path, order_of
from kw_lightning.nn.engine.paths import Path as EnginePath
from kw_lightning.nn.engine.paths.compiled import CompiledPath
from kw_lightning.nn.engine.problem import Problem

FUSED = ("mix_kernels/compiled", "mix_kernels/pointwise", "mix_inputs/compiled")


def names(problem: Problem, engine: str = "auto") -> list[str]:
    """Return the paths of an engine, the one that should be fastest first."""
    return [path.name for path in planner.rank(problem, engine)]


def multiply_adds(path: str, problem: Problem) -> int:
    """Count a pass by hand, from the orders of contraction alone.

    Backwards, kernels are mixed anew, and both gradients of the mixture and of the product are taken; where inputs or
    outputs are mixed, next to nothing is.
    """
    geometry, batch, size, cells, *_ = problem
    backward = problem.backward
    kernel, cell = math.prod(geometry.kernel_shape), math.prod(geometry.cell_shape)
    _, out_groups, in_groups = geometry.grid
    positions = math.prod(geometry.output_size(size))
    if path.startswith("mix_inputs"):
        return batch * cells * cell * out_groups * positions * (2 if backward else 1)
    if path.startswith("mix_outputs"):
        return batch * cells * cell * in_groups * math.prod(size) * (2 if backward else 1)
    if path == "mix_kernels/winograd":
        positions = math.ceil(geometry.output_size(size)[0] / 2) ** 2 * 16 / 9
    # On a map smaller than the kernel's reach, these leave out positions that read only padding.
    reach = path in ("mix_kernels/shifted", "mix_kernels/compiled") and geometry.kernel_shape[2] == 3
    live = min(1.0, (2 * size[0] - 1) ** 2 / 9) if reach else 1.0
    return int(batch * kernel * live * (3 * cells + 2 * positions if backward else cells + positions))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(16, 224), (1, 224), (64, 32), (3, 96), (16, 64)])
@pytest.mark.parametrize("name", LAYERS)
def test_work_is_near_the_least(name: str, batch: int, size: int, backward: bool) -> None:
    posed = problem(name, batch, size, backward=backward)
    ranked = names(posed)
    # Not of Winograd's form, whose multiply-adds are fewer but in many small products, nor of PyTorch's products, which
    # reach about two thirds of the compiled ones' speed; those alone move kernels through memory as well.
    least = min(
        multiply_adds(path, posed)
        for path in ranked
        if path in (FUSED if native.available() and LAYERS[name][7] == 1 else ranked)
    )
    # Of few samples, reading all cells takes as long as working on them, and packing them longer: mixed inputs, which
    # take them as they lie, are faster with 1.9 times the multiply-adds (ResNet50's reduction on 3², 0.9 of the time).
    limit = (1.25 if batch > 3 else 2.0) if native.available() else 3.0
    assert multiply_adds(ranked[0], posed) <= limit * least


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize(
    ("name", "batch", "size", "expected"),
    [
        ("resnet18 layer1", 16, 224, {"mix_kernels/winograd"}),
        ("resnet18 layer2.0.conv1", 16, 224, {"mix_kernels/compiled"}),
        ("resnet18 layer4", 16, 224, {"mix_kernels/compiled"}),
        ("resnet18 layer3", 64, 32, {"mix_inputs/compiled", "mix_outputs/by_cell"}),
        ("resnet18 layer4", 64, 32, {"mix_inputs/compiled", "mix_outputs/by_cell"}),
        ("resnet18 layer4", 3, 96, {"mix_inputs/compiled"}),
        ("convnext depthwise", 16, 224, {"mix_kernels/depthwise"}),
        ("resnet50 layer1 expand", 16, 224, {"mix_kernels/pointwise"}),
    ],
)
def test_shapes_get_the_path_measured_fastest(name: str, batch: int, size: int, expected: set[str]) -> None:
    assert names(problem(name, batch, size))[0] in expected


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_that_is_called_once_computes_what_is_next_to_nothing(backward: bool) -> None:
    geometry = Convolution((16, 16, 1, 1), (16, 16, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    posed = Problem(geometry, 4, (2, 2), 4, torch.float32, torch.device("cpu"), backward)
    assert isinstance(planner.rank(posed, "auto")[0], CompiledPath)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
@pytest.mark.parametrize(
    ("kernel", "cell", "cells", "side", "backward"),
    [((128, 128), (32, 16), 26, 7, False), ((256, 256), (128, 64), 6, 4, True)],
)
def test_narrow_cells_of_many_samples_mix_kernels_of_cells(
    kernel: tuple[int, int], cell: tuple[int, int], cells: int, side: int, backward: bool
) -> None:
    geometry = Convolution((*kernel, 1, 1), (*cell, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    posed = Problem(geometry, 128, (side, side), cells, torch.float32, torch.device("cpu"), backward, width=16)
    assert names(posed)[0] in ("mix_kernels/compiled", "mix_kernels/pointwise")


@pytest.mark.parametrize(
    ("name", "batch", "size", "expected"),
    [
        ("resnet18 layer1", 16, 224, {"mix_kernels/per_sample", "mix_kernels/grouped"}),
        ("resnet18 layer4", 64, 32, {"mix_inputs/by_cell", "mix_outputs/by_cell"}),
        ("convnext depthwise", 16, 224, {"mix_kernels/grouped"}),
    ],
)
def test_other_types_get_paths_of_pytorchs_products(name: str, batch: int, size: int, expected: set[str]) -> None:
    ranked = planner.rank(problem(name, batch, size, torch.float64), "auto")
    assert ranked[0].name in expected
    assert not any(isinstance(path, CompiledPath) for path in ranked)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_engine_names_only_paths_that_can(name: str, engine: str) -> None:
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "cuda")):
        posed = problem(name, 2, 32, dtype, device)
        if planner.refusal(engine, posed.convolution) is not None:
            assert posed.convolution.groups > 1
            assert engine in ("mix_inputs", "mix_outputs")
            with pytest.raises(ValueError, match=r"allowed: auto, autotune, mix_kernels, reference$"):
                planner.rank(posed, engine)
            continue
        ranked = planner.rank(posed, engine)
        assert ranked
        assert all(path.refusal(posed) is None for path in ranked)
        if engine in ORDERS:
            assert {order_of(path) for path in ranked} == {engine}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["resnet18 layer4", "mobilenetv2 depthwise"])
def test_a_survey_gives_every_path_with_its_time_or_the_reason_against_it(name: str, device: str) -> None:
    posed = problem(name, 4, 224, device=device)
    survey = planner.survey(posed, "auto")
    assert {choice.path for choice in survey} == set(PATHS)
    assert tuple(choice.path for choice in survey if choice.refusal is None) == planner.rank(posed, "auto")
    for choice in survey:
        assert (choice.refusal is None) >= (choice.seconds is not None)
        assert choice.path.refusal(posed) in (choice.refusal, None)
    times = [choice.seconds for choice in survey if choice.seconds is not None]
    assert times == sorted(times)
    assert bool(times) == (posed.convolution.groups == 1)  # others are not timed systematically


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_path_can_be_named_even_where_it_is_never_the_fastest(path: EnginePath) -> None:
    for name in ("resnet18 layer1", "mobilenetv2 depthwise"):
        posed = problem(name, 4)
        if path.refusal(posed) is None:
            assert planner.rank(posed, path.name) == (path,)


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
    assert first >= len(planner.rank(Problem.of(*tensors, geometry), "auto"))
    stored = json.loads(autotune.cache_file().read_text())
    assert {find_path(name) for name in stored.values()} <= set(PATHS)
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
    least = min(found, key=lambda problem: find_path("mix_kernels/per_sample").load(problem).mixing)
    for backward in (False, True):
        timed = study["timed"](least._replace(backward=backward), 1, [path.name for path in PATHS])
        assert len(timed) > 1
        assert all(find_path(name).fitted is not None for name in timed)


def test_the_study_finds_the_units_that_made_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    study = runpy.run_path(str(Path(__file__).parents[3] / "recipes/studies/engine_costs.py"))
    fitted = {path: path.fitted for path in PATHS if path.fitted is not None}
    in_winograds_form = find_path("mix_kernels/winograd_along_rank")
    times = [
        {"problem": index}
        | {
            name: {
                path.name: cpu_seconds(path.load(posed._replace(backward=backward)), units, backward=backward)
                for path, units in fitted.items()
                if path is not in_winograds_form or posed.kept  # else it is not timed
            }
            for name, backward in (("forward", False), ("backward", True))
        }
        for index, posed in enumerate(study["problems"]())
    ]
    study["fit"](times, list(study["problems"]()))
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines if " fitted = " in line)
    assert told.keys() == {path.name for path in fitted}
    for path, units in fitted.items():
        found = torch.tensor(eval(told[path.name].partition("=")[2], {"Fitted": Fitted, "Units": Units}))
        torch.testing.assert_close(found, torch.tensor(units), rtol=1e-6, atol=1e-15)
    assert sum(line.split(": ")[1].startswith("0 of ") for line in lines if " choices over " in line) == 2


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
    other = next(one.name for one in PATHS if one.name != path and not one.name.endswith("depthwise"))
    file.write_text(json.dumps({key: other, "of a stranger": "mix_kernels/shifted"}))
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
