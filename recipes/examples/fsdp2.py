"""FSDP2: layers, conversion and sharding in configure_model, so that no process holds all weights and optimizer states.

python recipes/examples/fsdp2.py --devices 2                                                   # on GPUs
torchrun --nproc_per_node=2 recipes/examples/fsdp2.py --devices 2 --accelerator cpu            # on a CPU, to try
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from own_module import RECIPE, Digits, Net
from torch import nn

import kw_lightning
from kw_lightning.callbacks import KWCallback, kw_fully_shard
from kw_lightning.fit.data import data_module


class ShardedDigits(Digits):
    """Makes its network late, because Lightning wants sharding done in configure_model."""

    def __init__(self, lr: float = 4e-3) -> None:
        super().__init__(lr)
        self.net = nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.net, Net):
            return  # Lightning may call it twice
        self.net = Net()
        kw_lightning.convert(self, RECIPE)  # before sharding: cells are shared by layers in several places
        kw_fully_shard(self.net, self.device_mesh["data_parallel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"))
    options = parser.parse_args()

    seed_everything(0)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=ModelParallelStrategy(
            data_parallel_size=options.devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        default_root_dir=options.folder,
        # The network is dynamic already: the callback anneals its temperature, logs and keeps the recipe.
        callbacks=[KWCallback(RECIPE), ModelCheckpoint(options.folder, filename="last", enable_version_counter=False)],
        log_every_n_steps=5,
    )
    trainer.fit(ShardedDigits(), data_module(kw_lightning.load_recipe("digits-resnet")))
    if trainer.is_global_zero:
        print(f"accuracy {trainer.callback_metrics['val/accuracy']:.4f}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
