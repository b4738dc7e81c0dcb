"""Two real processes against one, and the strategies that are refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from callback_networks import RECIPE, Classifier, Net, dynamic_net, loader, trainer
from distributed_script import IN_SINGLE, Recomputing, classifier, fit
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn

import kw_lightning
from kw_lightning.callbacks import KWCallback
from kw_lightning.callbacks.strategies import check_strategy
from kw_lightning.errors import KWError
from kw_lightning.nn import ContrastingAttention

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two processes found, started by torchrun."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {**_unseeded(), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed_script.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "find_unused_parameters" not in done.stderr
    return torch.load(folder / "results.pt")


def _unseeded() -> dict[str, str]:
    """Return the environment without the seed that another test's `seed_everything` left for all Trainers to come."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PL_")}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with mock.patch.dict(os.environ, _unseeded(), clear=True):
        return fit(tmp_path_factory.mktemp("one"), classifier(Net), processes=1)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=limit, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["ddp", "recomputing"])
def test_gradients_and_weights_are_those_of_one_process(two: Any, one: Any, kind: str) -> None:
    assert any(name.endswith("warehouse.cells") for name in one["gradients"])
    assert all(gradient.abs().max() > 0 for gradient in one["gradients"].values())
    same(two[kind]["gradients"], one["gradients"])
    same(two[kind]["weights"], one["weights"])


@pytest.mark.parametrize("kind", IN_SINGLE)
def test_ways_of_ddp_in_single_precision(two: Any, tmp_path: Path, kind: str) -> None:
    with mock.patch.dict(os.environ, _unseeded(), clear=True):
        expected = fit(tmp_path, classifier(IN_SINGLE[kind][0]).float(), processes=1)
    same({name: two[kind]["gradients"][name] for name in expected["gradients"]}, expected["gradients"])
    same(two[kind]["weights"], expected["weights"])


def test_recomputing_in_one_process(one: Any, tmp_path: Path) -> None:
    same(fit(tmp_path, classifier(Recomputing), processes=1)["gradients"], one["gradients"])


@pytest.mark.parametrize("kind", ["ddp", "recomputing", "fsdp2", "fsdp2 apart"])
def test_statistics_are_those_of_one_process(two: Any, one: Any, kind: str) -> None:
    same(two[kind]["means"], one["means"])
    for warehouse, numbers in one["statistics"].items():
        assert two[kind]["statistics"][warehouse] == pytest.approx(numbers, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 apart"])
def test_fsdp2_trains_to_the_weights_of_one_process(two: Any, one: Any, kind: str) -> None:
    same(two[kind]["weights"], one["weights"])
    assert float(two[kind]["weights"]["net.head.warehouse.temperature"]) == pytest.approx(0.7)


def test_random_numbers_of_both_processes_are_saved(two: Any, one: Any) -> None:
    assert (two["ddp"]["random"], one["random"]) == ([2], [1])


def test_fsdp1_trains_to_the_weights_of_one_process(two: Any, one: Any) -> None:
    weights = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in two["fsdp1"]["weights"].items()}
    same(weights, one["weights"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_strategies_train_on_a_gpu_to_the_weights_of_a_cpu(one: Any, tmp_path: Path, strategy: str) -> None:
    command = [sys.executable, str(HERE / "gpu_strategies_script.py"), str(tmp_path), strategy, "gpu"]
    path = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**_unseeded(), "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / f"{strategy}.pt", map_location="cpu")
    if strategy == "fsdp":  # Lightning lets it train in single precision
        same({name: value.double() for name, value in found["weights"].items()}, one["weights"], 1e-4)
    else:
        same(found["weights"], one["weights"])
        same(found["means"], one["means"])


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_sharding_that_splits_a_warehouse_is_refused(two: Any, kind: str) -> None:
    message = two[kind]["refused"]
    assert message.startswith(
        'warehouse "convolutions" is in the FSDP group of "net.conv1", and net.conv2 outside that group draw on it'
    )
    assert "kw_fully_shard" in message


def test_a_network_in_shards_is_not_made_dynamic(two: Any) -> None:
    expected = "Conv2d is sharded already: make the network dynamic before fully_shard or parallelize_module"
    assert expected in two["fsdp2"]["refused before"]


def test_tensor_parallelism_over_dynamic_layers_is_refused(two: Any) -> None:
    assert two["tensor parallel"].startswith('the cells of warehouse "convolutions" are split by tensor parallelism')
    assert "leave net.conv1, net.conv2 out of the plan of parallelize_module" in two["tensor parallel"]


def test_sync_batch_norm_reaches_the_attention() -> None:
    model = Classifier()
    recipe = {**RECIPE, "warehouses": {"a": {"layers": ["net.conv?"]}}}  # BatchNorm, the default
    kw_lightning.convert(model, recipe)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model = TorchSyncBatchNorm().apply(model)
    norms = [module.norm for module in model.modules() if isinstance(module, ContrastingAttention)]
    assert [type(norm) for norm in norms] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == before
    assert model.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_are_copies_are_refused(tmp_path: Path, method: Any) -> None:
    strategy = DDPStrategy(start_method=method)
    run = trainer(tmp_path, strategy=strategy, devices=2)
    with pytest.raises(
        KWError, match=r"ddp_spawn, ddp_fork, ddp_notebook.*kw_lightning.convert\(model, recipe\) before"
    ):
        check_strategy(run)
    with pytest.raises(KWError, match=r"kw_lightning.convert\(model.backbone, recipe\) before"):
        check_strategy(run, "backbone")


def test_deepspeed_stage_3_is_refused() -> None:
    class Run:
        strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)

    Run.strategy.config = {"zero_optimization": {"stage": 3}}
    with pytest.raises(KWError, match="DeepSpeed's stage 3 gathers the weights of one layer at a time"):
        check_strategy(Run())  # type: ignore[arg-type]


def test_one_process_is_not_refused(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(Classifier(dynamic_net()), loader())
