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
from kw_lightning.callbacks import AttentionStatistics, TemperatureAnnealing
from kw_lightning.nn import set_temperature


def network(device: torch.device) -> torch.nn.Module:
    model = kw_lightning.convert(torchvision.models.resnet18(), "resnet18-kw-1x").to(device).eval()
    set_temperature(model, 0.3)
    return model


def compare(
    device: torch.device, off: Callable[[], object], on: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of two functions, run in turns so that a busy machine is busy for both."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for index in range(2 * rounds + 4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        (off, on)[index % 2]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= 4:
            times[index % 2].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


@pytest.mark.slow
def test_statistics_cost_less_than_two_percent_of_a_step() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, size, rounds = (128, 224, 50) if device.type == "cuda" else (16, 112, 12)
    model, callback = network(device), AttentionStatistics()
    x = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    @torch.inference_mode()
    def validate() -> None:
        model.eval()
        model(x)

    def train() -> None:
        model.train()
        F.cross_entropy(model(x), labels).backward()
        model.zero_grad()

    def listening(run: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            callback.listen(model)
            run()
            callback._listening.close()

        return step

    step, _ = compare(device, train, train, max(rounds // 3, 3))
    off, on = compare(device, validate, listening(validate), rounds)
    print(
        f"\n{device.type}, ResNet18 1x, batch {batch} at {size}: training step {step * 1e3:.1f} ms, "
        f"validation step {off * 1e3:.1f} ms, with statistics {on * 1e3:.1f} ms: "
        f"{(on - off) / step:+.2%} of a training step, {(on - off) / off:+.2%} of a validation step"
    )
    assert (on - off) / step < 0.02


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
        start = time.perf_counter()
        timed(*arguments)
        seconds["step"] += time.perf_counter() - start

    annealing.on_train_batch_start = clocked  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(torch.randn(160, 3, 64, 64)), batch_size=16)
    start = time.perf_counter()
    trainer(tmp_path, callbacks=[annealing]).fit(Step(), data)
    whole = time.perf_counter() - start
    print(f"\ntemperature: {seconds['step'] / 10 * 1e6:.0f} µs a step of {whole / 10 * 1e3:.0f} ms")
    assert seconds["step"] < 0.005 * whole
