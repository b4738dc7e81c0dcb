"""What two real processes compute, for test_distributed.py: started by torchrun (gloo, CPU), writes into a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from callback_networks import RECIPE, Classifier, Net, dataset, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kw_lightning
from kw_lightning.callbacks import KWCallback, RandomState, kw_fully_shard, temperature_at
from kw_lightning.callbacks.strategies import check_sharding
from kw_lightning.errors import KWError
from kw_lightning.nn import KWConv2d, set_temperature, warehouses

STATISTICS = {**RECIPE, "log": {"attention": {"every_n_epochs": 1}}}
BATCH = 16  # of all processes together


class Recomputing(Net):
    """Keeps no activations of its convolutions: non-reentrant activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = checkpoint(lambda y: F.relu(self.conv2(F.relu(self.conv1(y)))), x, use_reentrant=False)
        return self.head(x.mean(dim=(2, 3)))


class LeavingOut(Net):
    """Does not use its first dynamic layer, on whose warehouse another draws too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.stem(x)))).mean(dim=(2, 3)))


class Sharded(Classifier):
    """FSDP2 as ModelParallelStrategy wants it: layers, conversion and sharding in configure_model."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(3)
            self.net = Net().double()
            kw_lightning.convert(self, RECIPE)
            kw_fully_shard(self.net, self.device_mesh["data_parallel"])


class ShardedApart(Sharded):
    """Each warehouse as one FSDP group, and each layer as another."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(3)
            self.net = Net().double()
            kw_lightning.convert(self, RECIPE)
            for module in (*warehouses(self.net).values(), self.net.conv1, self.net.conv2, self.net):
                torch.distributed.fsdp.fully_shard(module, mesh=self.device_mesh["data_parallel"])


class ShardedByBlock(Sharded):
    """The mistake: one FSDP group a layer, although the layers share their cells."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()
            kw_lightning.convert(self, RECIPE)
            for layer in (self.net.conv1, self.net.conv2, self.net):
                torch.distributed.fsdp.fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ShardedBefore(Sharded):
    """The other mistake: sharded by itself, so that KWCallback finds it in shards."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()
            torch.distributed.fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


IN_SINGLE: dict[str, tuple[type[Net], dict[str, bool]]] = {  # in the precision of the compiled passes
    "unused": (LeavingOut, {"find_unused_parameters": True}),
    "static graph": (Net, {"static_graph": True, "gradient_as_bucket_view": True}),
}


class Gradients(Callback):
    """Keeps the gradients of the first step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.found:
            self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            missing = [name for name, p in pl_module.named_parameters() if p.grad is None]
            assert not missing or isinstance(pl_module.net, LeavingOut), missing


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    images, labels = dataset(48).tensors
    return TensorDataset(images.to(dtype), labels)


def fit(folder: Path, model: Classifier, *, processes: int, **options: Any) -> dict[str, Any]:
    """Train for three steps and return gradients, weights and statistics."""
    callback, gradients = KWCallback(STATISTICS), Gradients()
    run = trainer(folder, callbacks=[callback, gradients, RandomState()], devices=processes, **options)
    # Lightning's own sampler would shuffle; this one deals the samples of each global batch out.
    samples = data(next((parameter.dtype for parameter in model.parameters()), torch.float64))
    sampler = DistributedSampler(samples, processes, int(os.environ.get("RANK", "0")), shuffle=False)
    batches = DataLoader(samples, batch_size=BATCH // processes, sampler=sampler)
    run.fit(model, batches, DataLoader(samples, batch_size=BATCH // processes))
    run.save_checkpoint(folder / "full.ckpt")
    run.strategy.barrier()
    saved = torch.load(folder / "full.ckpt")
    assert callback.attention is not None
    return {
        "gradients": gradients.found,
        "weights": saved["state_dict"],
        "statistics": {name: summary.scalars() for name, summary in callback.attention.latest.items()},
        "means": {name: summary.mean for name, summary in callback.attention.latest.items()},
        "random": [len(s["processes"]) for k, s in saved["callbacks"].items() if k == "RandomState"],
    }


def classifier(kind: type[Net]) -> Classifier:
    torch.manual_seed(3)
    return Classifier(kind().double())


def fsdp1(model: Classifier) -> dict[str, Any]:
    """Train three steps under FSDP1, which Lightning offers on GPUs only, as one group; and refuse several groups."""
    kw_lightning.convert(model, RECIPE)
    images, labels = data().tensors
    rank = torch.distributed.get_rank()
    device = torch.device("cpu")
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
    check_sharding(sharded)
    optimizer = model.configure_optimizers()
    for step in range(3):
        set_temperature(model, temperature_at(step + 1, 10))
        mine = slice(step * BATCH + rank, (step + 1) * BATCH, 2)
        optimizer.zero_grad()
        F.cross_entropy(sharded(images[mine]), labels[mine]).backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(sharded):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    by_layer = classifier(Net)
    kw_lightning.convert(by_layer, RECIPE)
    policy = ModuleWrapPolicy({KWConv2d})
    try:
        check_sharding(FullyShardedDataParallel(by_layer, auto_wrap_policy=policy, device_id=device))
    except KWError as error:
        return {"weights": weights, "refused": str(error)}
    raise AssertionError("one group a layer was not refused")


def tensor_parallel(model: Classifier) -> str:
    """Return why cells that tensor parallelism has split are refused."""
    kw_lightning.convert(model, RECIPE)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    warehouse = model.net.conv1.warehouse
    warehouse.cells = nn.Parameter(distribute_tensor(warehouse.cells.detach(), mesh["tensor_parallel"], [Shard(0)]))
    try:
        check_sharding(model)
    except KWError as error:
        return str(error)
    raise AssertionError("split cells were not refused")


def main(folder: Path) -> None:
    results = {
        "ddp": fit(folder / "ddp", classifier(Net), processes=2, strategy="ddp"),
        "recomputing": fit(folder / "recomputing", classifier(Recomputing), processes=2, strategy="ddp"),
    }
    for name, (kind, options) in IN_SINGLE.items():
        model = classifier(kind).float()
        results[name] = fit(folder / name, model, processes=2, strategy=DDPStrategy(**options))
    for name, model in (("fsdp2", Sharded()), ("fsdp2 apart", ShardedApart())):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
        results[name] = fit(folder / name, model, processes=2, strategy=sharded)
        results[name]["gradients"] = {}  # in shards
    for name, mistake in (("refused", ShardedByBlock()), ("refused before", ShardedBefore())):
        try:
            again = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            fit(folder / "refused", mistake, processes=2, strategy=again)
        except KWError as error:
            results["fsdp2"][name] = str(error)
    results["fsdp1"] = fsdp1(classifier(Net))
    results["tensor parallel"] = tensor_parallel(classifier(Net))
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # as Python ends, gloo's threads may abort the process: pytorch/pytorch#190489
