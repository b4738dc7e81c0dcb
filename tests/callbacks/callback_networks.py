"""Small networks, data and Trainers for the tests of the callbacks; also imported by the scripts that they start."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kw_lightning.nn import KWConv2d, KWLinear, share_warehouse

RECIPE: dict[str, Any] = {
    "kw": 1,
    "name": "tiny",
    "warehouses": {
        "convolutions": {"layers": ["net.conv1", "net.conv2"], "attention": {"norm": "layer"}},
        "head": {"layers": ["net.head"], "attention": {"norm": "layer"}},
    },
    "temperature": {"steps": 10},
}


class Net(nn.Module):
    """A static network of two convolutions and a linear layer, for images [batch, 1, 8, 8]."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(x.mean(dim=(2, 3)))


def dynamic_net(norm: str = "layer") -> Net:
    """Return a `Net` with dynamic layers, put together by hand."""
    net = Net()
    net.conv1, net.conv2 = KWConv2d(8, 8, 3, padding=1), KWConv2d(8, 16, 3, padding=1, stride=2)
    net.head = KWLinear(16, 4)
    share_warehouse([net.conv1, net.conv2], name="convolutions", norm=norm)
    share_warehouse([net.head], name="head", norm=norm)
    return net


class Classifier(LightningModule):
    """A LightningModule as a user has it: the network in the constructor, one loss, one optimizer."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05, batch_size: int = 8) -> None:
        super().__init__()
        self.net = Net() if net is None else net
        self.lr, self.batch_size = lr, batch_size

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch_size=self.batch_size)


def dataset(samples: int = 40) -> TensorDataset:
    """Return noisy images of four classes, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    return TensorDataset(patterns[labels] + 0.5 * torch.randn(samples, 1, 8, 8, generator=generator), labels)


def loader(samples: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size=batch_size)


def trainer(folder: Path, **options: Any) -> Trainer:
    """Return a quiet Trainer on the CPU that writes into `folder`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**defaults, **options})
