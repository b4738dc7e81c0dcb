"""Trains three short epochs with all that has a state; may kill itself, and go on from its last checkpoint."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from callback_networks import RECIPE, Classifier, Net, dataset, loader, trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from kw_lightning.callbacks import AtomicCheckpointIO, KWCallback, RandomState, ResumableDataLoader
from kw_lightning.nn import warehouses

RECIPE = {
    **RECIPE,
    "temperature": {"steps": 18},
    "log": {"attention": {"every_n_epochs": 1}},
}


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Watch(Callback):
    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.temperatures: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        print(f"resumed at step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        (value,) = {float(warehouse.temperature) for warehouse in warehouses(pl_module).values()}
        self.temperatures[str(trainer.global_step + 1)] = value

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    seed_everything(1, verbose=False)
    net = Net()
    net.head = nn.Sequential(nn.Dropout(0.3), net.head)  # random numbers in every step
    recipe = {**RECIPE, "warehouses": {**RECIPE["warehouses"], "head": {"layers": ["net.head.1"]}}}
    kernel_warehouse = KWCallback(recipe)
    watch = Watch(options.kill_at)
    checkpoint = ModelCheckpoint(options.folder, every_n_train_steps=5, save_last=True, save_top_k=0)
    run = trainer(
        options.folder,
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[kernel_warehouse, EMAWeightAveraging(decay=0.9), RandomState(), checkpoint, watch],
        plugins=[AtomicCheckpointIO()],
    )
    model = Scheduled(net)
    data = ResumableDataLoader(dataset(56), batch_size=8, shuffle=True)
    last = options.folder / "last.ckpt" if options.resume else None
    run.fit(model, data, loader(samples=16), ckpt_path=last)
    run.save_checkpoint(options.folder / "end.ckpt")
    saved = torch.load(options.folder / "end.ckpt")
    end = {
        "weights": saved["state_dict"],
        "current": saved["current_model_state"],
        "average": saved["averaging_state"],
        "optimizer": {str(k): v for s in saved["optimizer_states"][0]["state"].values() for k, v in s.items()},
        "schedule": saved["lr_schedulers"][0],
        "statistics": kernel_warehouse.attention.state_dict()["latest"],
        "temperatures": {step: value for step, value in watch.temperatures.items() if int(step) > 10},
    }
    torch.save(end, options.folder / "end.pt")


if __name__ == "__main__":
    main()
