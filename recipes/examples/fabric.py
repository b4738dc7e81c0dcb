"""A training loop of one's own with Fabric: convert, set the temperature before every step, summarise the attention.

python recipes/examples/fabric.py --epochs 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from own_module import RECIPE, Net
from torch import nn
from torch.nn import functional as F

import kw_lightning
from kw_lightning.callbacks import AttentionStatistics, temperature_at
from kw_lightning.fit.data import data_module
from kw_lightning.nn import set_temperature


class Model(nn.Module):
    """Holds the network under the name that the recipe uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/fabric"))
    options = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(0)
    recipe = kw_lightning.load_recipe(RECIPE)
    model = kw_lightning.convert(Model(), recipe)  # before the optimizer, and before setup wraps the network
    net, optimizer = fabric.setup(model.net, torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05))
    data = data_module(kw_lightning.load_recipe("digits-resnet"))
    batches, validation = fabric.setup_dataloaders(data.train_dataloader(), data.evaluation_loader("val"))

    annealing = recipe.temperature
    start = 1.0 if annealing.start is None else annealing.start
    total_steps = round((annealing.epochs or 0) * len(batches))
    step = 0
    for epoch in range(options.epochs):
        net.train()
        for images, labels in batches:
            step += 1
            set_temperature(model, temperature_at(step, total_steps, start=start, end=annealing.end))
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(net(images), labels))
            optimizer.step()

        statistics = AttentionStatistics()
        statistics.listen(model)
        net.eval()
        with torch.no_grad():
            right = sum(int((net(images).argmax(dim=1) == labels).sum()) for images, labels in validation)
        similarity = {name: round(summary.similarity, 3) for name, summary in statistics.summaries().items()}
        fabric.print(f"epoch {epoch}: accuracy {right / len(data.parts['val']):.4f}, similarity {similarity}")

    fabric.save(options.folder / "last.ckpt", {"model": model.net, "optimizer": optimizer, "step": step})


if __name__ == "__main__":
    main()
