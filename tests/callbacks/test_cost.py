"""What the callbacks cost: python -m pytest tests/callbacks/test_cost.py -m slow -s"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from callback_networks import trainer
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kw_lightning
from kw_lightning.callbacks import AttentionMetric, AttentionStatistics, TemperatureAnnealing
from kw_lightning.nn import set_temperature


def network(device: torch.device) -> torch.nn.Module:
    model = kw_lightning.convert(torchvision.models.resnet18(), "resnet18-kw-1x").to(device).eval()
    set_temperature(model, 0.3)
    return model


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of a function, after two rounds that do not count."""
    times = []
    for _ in range(rounds + 2):
        start = clock(device)
        run()
        times.append(clock(device) - start)
    return statistics.median(times[2:])


def clock(device: torch.device) -> float:
    """Return seconds: of the GPU's work, or of this process's own, which other processes do not lengthen."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.slow
def test_statistics_cost_less_than_two_percent_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, size, rounds = (128, 224, 30) if device.type == "cuda" else (16, 112, 4)
    model, callback = network(device), AttentionStatistics()
    x = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    inside = {"seconds": 0.0}
    update = AttentionMetric.update

    def clocked(self: AttentionMetric, layer: int, attention: torch.Tensor) -> None:
        start = clock(device)
        update(self, layer, attention)
        inside["seconds"] += clock(device) - start

    @torch.inference_mode()
    def validate() -> None:
        model(x)

    def train() -> None:
        F.cross_entropy(model(x), labels).backward()
        model.zero_grad()

    model.train()
    step = median_seconds(train, device, rounds)
    model.eval()
    validation = median_seconds(validate, device, rounds)
    # What the hooks take is clocked from inside: the difference of two steps is lost in their own variation.
    monkeypatch.setattr(AttentionMetric, "update", clocked)
    callback.listen(model)
    hooked = []
    for _ in range(rounds):
        inside["seconds"] = 0.0
        validate()
        hooked.append(inside["seconds"])
    cost = statistics.median(hooked)
    assert set(callback.summaries()) == {"stage1", "stage2", "stage3", "stage4"}
    print(f"\n{device.type}, ResNet18 1x, batch {batch} at {size}, ms: {step * 1e3:.1f} a training step, ", end="")
    print(f"{validation * 1e3:.1f} a validation step, {cost * 1e3:.2f} the statistics in it: ", end="")
    print(f"{cost / step:.2%} and {cost / validation:.2%}")
    assert cost < 0.02 * step


@pytest.mark.slow
def test_the_temperature_costs_next_to_nothing(tmp_path: Path) -> None:
    class Step(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.device("cpu"))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum() * 0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    seconds = {"step": 0.0}
    annealing = TemperatureAnnealing(steps=10)
    timed = annealing.on_train_batch_start

    def clocked(*arguments: Any) -> None:
        start = time.process_time()
        timed(*arguments)
        seconds["step"] += time.process_time() - start

    annealing.on_train_batch_start = clocked  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(torch.randn(160, 3, 64, 64)), batch_size=16)
    start = time.process_time()
    trainer(tmp_path, callbacks=[annealing]).fit(Step(), data)
    whole = time.process_time() - start
    print(f"\ntemperature: {seconds['step'] / 10 * 1e6:.0f} µs a step of {whole / 10 * 1e3:.0f} ms")
    assert seconds["step"] < 0.005 * whole
