"""Your own LightningModule, made dynamic by one line: KWCallback.

python recipes/examples/own_module.py --epochs 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning import KWCallback, load_recipe
from kw_lightning.callbacks import load_from_checkpoint
from kw_lightning.fit.data import data_module

RECIPE = Path(__file__).with_name("digits.yaml")


class Net(nn.Module):
    """Four convolutions and a classifier for images [batch, 1, 8, 8]; nothing in it knows of warehouses."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (32, 32, 32, 64, 64))
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.stem, self.conv1, self.conv2, self.conv3, self.conv4)
        for layer, norm in zip(layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.classifier(x.mean(dim=(2, 3)))


class Digits(LightningModule):
    """A classifier as one writes it."""

    def __init__(self, lr: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = (self.net(images).argmax(dim=1) == labels).float()
        self.log("val/accuracy", right.mean(), batch_size=len(labels), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/own-module"))
    options = parser.parse_args()

    seed_everything(0)
    data = data_module(load_recipe("digits-resnet"))  # the digits that ship with the package
    trainer = Trainer(
        max_epochs=options.epochs,
        default_root_dir=options.folder,
        callbacks=[
            KWCallback(RECIPE),  # this line; callbacks that copy the network come after it
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(options.folder, filename="last", enable_version_counter=False),
        ],
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), data)

    # The checkpoint has the recipe inside, so it loads without the Trainer and without the file.
    model = load_from_checkpoint(Digits, options.folder / "last.ckpt")
    (metrics,) = Trainer(logger=False).validate(model, data, verbose=False)
    print(f"accuracy {metrics['val/accuracy']:.4f}")


if __name__ == "__main__":
    main()
