"""What one process computes on a GPU under a strategy, for test_distributed.py: `FOLDER STRATEGY`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from callback_networks import Net
from distributed_script import Sharded, classifier, fit
from lightning.pytorch.strategies import ModelParallelStrategy


def main(folder: Path, name: str, accelerator: str) -> None:
    strategy: Any = name
    if name == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    model = Sharded() if name == "fsdp2" else classifier(Net)
    found = fit(folder / name, model, processes=1, strategy=strategy, accelerator=accelerator)
    torch.save({"weights": found["weights"], "means": found["means"]}, folder / f"{name}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
