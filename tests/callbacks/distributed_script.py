"""What two real processes compute, for test_distributed.py: started by torchrun (gloo, CPU), writes into a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from callback_networks import RECIPE, Classifier, Net, dataset, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kw_lightning
from kw_lightning.callbacks import KWCallback, RandomState, kw_fully_shard
from kw_lightning.errors import KWError

STATISTICS = {**RECIPE, "log": {"attention": {"every_n_epochs": 1}}}
BATCH = 16  # of all processes together


class Recomputing(Net):
    """Keeps no activations of its convolutions: non-reentrant activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = checkpoint(lambda y: F.relu(self.conv2(F.relu(self.conv1(y)))), x, use_reentrant=False)
        return self.head(x.mean(dim=(2, 3)))


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


class ShardedByBlock(Sharded):
    """The mistake: one FSDP group a layer, although the layers share their cells."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()
            kw_lightning.convert(self, RECIPE)
            for layer in (self.net.conv1, self.net.conv2, self.net):
                torch.distributed.fsdp.fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Gradients(Callback):
    """Keeps the gradients of the first step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.found:
            self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            missing = [name for name, p in pl_module.named_parameters() if p.grad is None]
            assert not missing, missing


def data() -> TensorDataset:
    images, labels = dataset(48).tensors
    return TensorDataset(images.double(), labels)


def fit(folder: Path, model: Classifier, *, processes: int, **options: Any) -> dict[str, Any]:
    """Train for three steps and return gradients, weights and statistics."""
    callback, gradients = KWCallback(STATISTICS), Gradients()
    run = trainer(folder, callbacks=[callback, gradients, RandomState()], devices=processes, **options)
    # Lightning's own sampler would shuffle; this one deals the samples of each global batch out.
    sampler = DistributedSampler(data(), processes, int(os.environ.get("RANK", "0")), shuffle=False)
    batches = DataLoader(data(), batch_size=BATCH // processes, sampler=sampler)
    run.fit(model, batches, DataLoader(data(), batch_size=BATCH // processes))
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


def main(folder: Path) -> None:
    results = {
        "ddp": fit(folder / "ddp", classifier(Net), processes=2, strategy="ddp"),
        "recomputing": fit(folder / "recomputing", classifier(Recomputing), processes=2, strategy="ddp"),
    }
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    results["fsdp2"] = fit(folder / "fsdp2", Sharded(), processes=2, strategy=sharded)
    results["fsdp2"]["gradients"] = {}  # in shards
    try:
        again = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        fit(folder / "refused", ShardedByBlock(), processes=2, strategy=again)
    except KWError as error:
        results["refused"] = str(error)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
