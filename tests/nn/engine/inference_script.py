"""Evaluates in inference mode and then trains, as a fresh process does: what is kept from the first must serve both.

    python inference_script.py ENGINE ...

It exits with 1 where that fails, or a gradient differs from that of a training without an evaluation before it.
"""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse


def network(engine: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [KWConv2d(8, 8, 3, padding=1), KWConv2d(8, 16, 3, stride=2, padding=1), KWConv2d(16, 16, 1)]
    if engine not in ("mix_inputs", "mix_outputs"):
        layers.append(KWConv2d(16, 16, 3, padding=1, groups=16))
    for index, layer in enumerate(layers):
        share_warehouse([layer], name=f"{index}")
    head = KWLinear(16, 4)
    share_warehouse([head], name="head")
    for layer in (*layers, head):
        layer.engine = engine
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    set_temperature(net, 0.5)
    return net


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network("auto")

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.network(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.inferred = torch.is_inference_mode_enabled()
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def validate_and_fit() -> None:
    data = DataLoader(TensorDataset(torch.randn(4, 8, 9, 9)), batch_size=2)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet)
    module = Module()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.validate(module, data, verbose=False)
    assert module.inferred
    trainer.fit(module, data, data)
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def train(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.train()
    net(x).square().mean().backward()
    return [parameter.grad for parameter in net.parameters()]


def check(evaluated: nn.Module, x: Tensor, name: str, failures: list[str]) -> None:
    fresh = copy.deepcopy(evaluated)
    try:
        with torch.inference_mode():
            evaluated.eval()(x)
        for found, wanted in zip(train(evaluated, x), train(fresh, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    except Exception as error:
        failures.append(f"{name}: {error}")


def main(engines: list[str]) -> int:
    validate_and_fit()
    failures: list[str] = []
    for engine in engines:
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(6, 8, 9, 9, dtype=dtype)
            # Memory is kept a thread: each of these makes its own in inference mode.
            arguments = [(network(engine).to(dtype), x, f"{engine}, {dtype}", failures) for _ in range(2)]
            threads = [threading.Thread(target=check, args=each) for each in arguments]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    print("\n".join(failures), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
