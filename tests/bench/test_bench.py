"""Benchmarks: what is measured and how it is shown, on a small network."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kw_lightning.bench import Setting, bench_layers
from kw_lightning.bench import run as run_module
from kw_lightning.bench.networks import check_batch_norms
from kw_lightning.bench.table import aligned, markdown
from kw_lightning.bench.timing import interleaved, kept_bytes, median_ratio
from kw_lightning.cli import application
from kw_lightning.errors import KWError
from kw_lightning.nn import KWConv2d, KWLinear, share_warehouse
from kw_lightning.nn.engine import ENGINES, native

RECIPE = """
kw: 1
name: small
model:
  input: [3, 8, 8]
  layers:
    - Conv2D: {filters: 8, kernel_size: 3, padding: same, warehouse: w}
    - Conv2D: {filters: 8, kernel_size: 3, padding: same, warehouse: v}
    - GlobalAveragePooling2D
    - Dense: {units: 4}
warehouses:
  w: {budget: 1}
  v: {budget: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(application(), ["bench", *arguments, "--repeats", "1", "--batch", "2"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_has_every_figure(recipe: str) -> None:
    data = json.loads(run(recipe, "--json", "--size", "6"))
    assert data["machine"]["gemm"] > 0
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["compiled_passes"] == str(native.status())
    (network,) = data["networks"]
    assert network["input"] == [2, 3, 6, 6]
    training, inference = network["networks"]
    assert (training["mode"], inference["mode"]) == ("training", "inference")
    for result in (training, inference):
        assert set(result["seconds"]) == {"static", "reference", "kw"}
        assert all(seconds > 0 for seconds in result["seconds"].values())
        assert result["ratio"]["static"] == 1
        assert -1 < result["attention"] < 2  # a difference of times, in inference of few microseconds here
    assert training["kept_bytes"]["kw"] < training["kept_bytes"]["reference"]
    # Two convolutions and a linear layer, of a batch of two.
    assert training["multiply_adds"]["static"] == 2 * (36 * 9 * (3 * 8 + 8 * 8) + 8 * 4)
    assert [layer["kernel"] for layer in network["layers"]] == [[8, 3, 3, 3], [8, 8, 3, 3]]
    assert network["layers"][1]["multiply_adds"]["static"] == 2 * 36 * 9 * 64


def test_compiled_networks_are_measured_beside_each_other(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # followed, without a C++ compiler
    counters = torch._dynamo.utils.counters
    counters.clear()
    data = json.loads(run(recipe, "--json", "--compile", "--no-reference", "--no-layers"))
    assert counters["stats"]["unique_graphs"] == 4  # two networks, in training and in inference
    (network,) = data["networks"]
    assert network["compiled"] == "default"
    for result in network["networks"]:
        assert result["attention"] is None
        assert set(result["seconds"]) == {"static", "kw"}
    assert network["networks"][0]["kept_bytes"]["kw"] > 0
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode, **_: (modes.append(mode), network)[1])
    options = ("--compile-mode", "reduce-overhead", "--no-reference")
    assert "small, batch 2, 8×8, layers, not compiled: forward" in run(recipe, *options)
    assert set(modes) == {"reduce-overhead"}
    result = CliRunner().invoke(application(), ["bench", recipe, "--compile-mode", "reduce"])
    assert 'the unknown mode "reduce", allowed: default, ' in result.output


def test_a_network_that_cannot_be_compiled_is_one_message(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    options = ["bench", recipe, "--compile", "--no-reference", "--no-layers", "--repeats", "1", "--batch", "2"]
    result = CliRunner().invoke(application(), options)
    assert result.exit_code == 1
    assert 'torch.compile cannot compile "small": no C++ compiler here' in result.output.splitlines()


def test_tables_name_machine_networks_and_layers(recipe: str) -> None:
    text = run(recipe, "--no-reference")
    assert f"compiled passes {native.status()}" in text
    assert re.search(r"GFLOP/s in a (256|1024|2048)³ matrix product", text)
    assert "small, batch 2, 8×8" in text
    assert "8×8×3×3" in text
    table = run(recipe, "--markdown", "--no-layers", "--channels-last", "--dtype", "bfloat16")
    assert "| network | mode |" in table
    assert "8×8×3×3" not in table


def test_half_precision_is_measured_without_compiled_passes_as_on_a_gpu(recipe: str) -> None:
    command = [sys.executable, "-m", "kw_lightning.cli", "bench", recipe, "--dtype", "bfloat16", "--json"]
    options = ["--no-layers", "--repeats", "1", "--batch", "2"]
    environment = {**os.environ, "KW_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    (network,) = json.loads(result.stdout)["networks"]
    assert [set(mode["seconds"]) for mode in network["networks"]] == [{"static", "reference", "kw"}] * 2


def test_the_engine_can_be_named(recipe: str) -> None:
    data = json.loads(run(recipe, "--json", "--no-reference", "--engine", "mix_inputs"))
    paths = {path for layer in data["networks"][0]["layers"] for path in layer["paths"]}
    assert {path.partition("/")[0] for path in paths} == {"mix_inputs"}


def test_an_engine_that_cannot_compute_the_network_is_refused_before_anything_is_timed() -> None:
    result = CliRunner().invoke(application(), ["bench", "mobilenetv2-050-kw-1x", "--engine", "mix_inputs"])
    assert result.exit_code == 2
    assert 'engine: found "mix_inputs", which cannot compute "features.1.conv.0.0" [16×1×3×3, 16' in result.output


def test_every_recipe_is_planned_before_the_first_is_measured(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(RECIPE.replace("filters: 8, kernel_size: 3, padding: same", "filters: 8, kernel_size: 9", 1))
    measured: list[object] = []
    monkeypatch.setattr(run_module, "run_bench", lambda bench, **_: measured.append(bench))
    result = CliRunner().invoke(application(), ["bench", recipe, str(faulty)])
    assert result.exit_code == 2, result.output
    assert "faulty.yaml" in result.output
    assert not measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--engine", "mix_kernel"],
            f'found the unknown engine "mix_kernel", allowed: {", ".join(ENGINES)}; did you mean "mix_kernels"?',
        ),
        (["--dtype", "int8"], 'found the unknown dtype "int8", allowed: float32, float64, bfloat16, float16'),
        (["--device", "gpu"], 'found the unknown device "gpu", allowed: cpu, cuda or cuda:1'),
    ],
)
def test_mistakes_are_named(recipe: str, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(application(), ["bench", recipe, *arguments])
    assert result.exit_code == 1
    assert message in result.output.splitlines()


def test_batch_norm_of_one_value_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "normed.yaml"
    monkeypatch.setattr("kw_lightning.bench.machine.GEMM_SIDES", (64,))  # its speed does not matter here
    pooling = "    - GlobalAveragePooling2D\n"
    path.write_text(RECIPE.replace("small", "normed").replace(pooling, "    - BatchNormalization\n" + pooling))
    arguments = ["bench", str(path), "--batch", "1", "--repeats", "1", "--no-reference", "--no-layers"]
    assert CliRunner().invoke(application(), [*arguments, "--size", "2"]).exit_code == 0
    assert CliRunner().invoke(application(), [*arguments, "--size", "1", "--batch", "2"]).exit_code == 0
    monkeypatch.delattr("kw_lightning.bench.networks.interleaved")
    result = CliRunner().invoke(application(), [*arguments, "--size", "1"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith('"normed" cannot train on batch 1 of 3×1×1: the BatchNorm "')
    assert result.stderr.endswith("one value per channel, which has no variance; give a larger --batch or --size\n")


def test_frozen_batch_norm_may_get_one_value() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    setting = Setting((1, 3, 1, 1))
    check_batch_norms(nn.Sequential(Frozen(3)), setting, "frozen")
    with pytest.raises(KWError, match=r'"free" cannot train .* "0" gets one value'):
        check_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), setting, "free")


def test_equal_layers_are_measured_once_and_linear_ones_too() -> None:
    layers = [KWConv2d(4, 4, 3, padding=1) for _ in range(2)]
    share_warehouse(layers)
    linear = KWLinear(4, 6)
    share_warehouse([linear], name="linear")
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    results = bench_layers(net, Setting((2, 4, 5, 5), repeats=1, reference=False))
    assert [result.names for result in results] == [("0", "1"), ("4",)]
    assert results[1].multiply_adds["static"] == 2 * 24
    assert results[0].size == (5, 5)
    assert [layer.engine for layer in layers] == ["auto", "auto"]


def test_kept_bytes_count_each_storage_once() -> None:
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(10, 10)
    assert kept_bytes(lambda: (x @ weight, x.t() @ weight), [weight]) == 400
    assert kept_bytes(lambda: (x @ weight).exp(), [weight]) == 800


def test_a_network_whose_kept_bytes_were_counted_can_go() -> None:
    def counted() -> weakref.ref[torch.Tensor]:
        network = torch.nn.Linear(10, 10)
        kept_bytes(lambda: network(torch.ones(10, 10)).exp(), network.parameters())
        return weakref.ref(network.weight)

    gone = counted()
    gc.collect()
    assert gone() is None


def test_functions_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), 2)
    assert order == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
    assert median_ratio({"a": [2.0, 3.0, 9.0], "b": [1.0, 1.0, 1.0]}, "a", "b") == 3.0


def test_tables_are_aligned_or_markdown() -> None:
    assert aligned(("name", "ms"), [("a", "1.5"), ("long", "10")]) == "name   ms\na     1.5\nlong   10"
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
