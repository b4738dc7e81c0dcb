"""Time and memory of a ResNet18 over the number of its cells: mixed cell by cell, and along the attention's rank.

    python recipes/studies/cells.py --output cells.json --plot cells.svg

Both ways, and the static network, are timed in turns in one process, so that a busy machine is busy for all of them;
only ratios to the static network's are worth keeping. `--quick` is a narrow network on small images. The plot needs
matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.bench import describe_machine
from kw_lightning.bench.timing import kept_bytes
from kw_lightning.nn import KWConv2d, set_temperature, share_warehouse
from kw_lightning.nn.engine import bases, kept

WAYS = {"cell by cell": "never", "along the rank": "auto"}
SLOWEST = 15  # a way that takes so many times the static network's time is timed once, and not with more cells


class Block(nn.Module):
    """Two 3×3 convolutions and what goes past them; `layer` makes the convolutions."""

    def __init__(self, layer: Callable[..., nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layer(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = layer(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.past = layer(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.past(x))


def make_network(width: int, budget: float | None) -> nn.Module:
    """Return a ResNet18 for small images; None is the static one, else a warehouse a stage, as published."""
    layer = nn.Conv2d if budget is None else KWConv2d
    channels = [width * 2**stage for stage in range(4)]
    network = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    for stage, outputs in enumerate(channels):
        inputs = channels[max(stage - 1, 0)]
        network.append(Block(layer, inputs, outputs, 1 if stage == 0 else 2))
        network.append(Block(layer, outputs, outputs, 1))
    network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)])
    if budget is not None:
        for stage, members in enumerate(stages(network)):
            share_warehouse(members, name=f"stage{stage + 1}", budget=budget)
        set_temperature(network, 0.0)
    return network


def stages(network: nn.Module) -> list[list[KWConv2d]]:
    """Return the dynamic layers by warehouse: those of a stage, and those that lead to the next."""
    found: list[list[KWConv2d]] = [[] for _ in range(4)]
    blocks = [module for module in network if isinstance(module, Block)]
    for index, block in enumerate(blocks):
        for layer in block.modules():
            if isinstance(layer, KWConv2d):
                leads = index and index % 2 == 0 and layer is not block.conv2
                found[index // 2 - bool(leads)].append(layer)
    return found


def kept_by(network: nn.Module, images: Tensor) -> int:
    """Return the bytes that a training network keeps for the backward pass, parameters apart."""
    network.train()
    return kept_bytes(lambda: network(images), network.parameters())


def train(network: nn.Module, images: Tensor) -> None:
    """Do a training step but for the optimizer."""
    network.train().zero_grad()
    network(images).square().mean().backward()


def infer(network: nn.Module, images: Tensor) -> None:
    """Compute the answers."""
    network.eval()
    with torch.inference_mode():
        network(images)


def measure(
    width: int, budgets: list[float], sizes: dict[str, tuple[int, int]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield what every budget takes, both ways, beside the static network in the same rounds.

    Args:
        width: channels of the first stage.
        budgets: b, of all warehouses.
        sizes: batch and side of the images, by mode.
        rounds: of timing; the fastest is kept.
    """
    torch.manual_seed(0)
    if width < 8:  # torch 2.14 writes past its memory in the backward pass of 4 channels, channels last, on small maps
        raise ValueError(f"a width of 8 or more: found {width}")
    static = make_network(width, None)
    images = {mode: torch.randn(batch, 3, side, side) for mode, (batch, side) in sizes.items()}
    images = {mode: x.to(memory_format=torch.channels_last) for mode, x in images.items()}
    base = kept_by(static, images["training"])
    parameter_bytes = sum(parameter.nbytes for parameter in static.parameters())
    ways = {mode: ["static", *WAYS] for mode in sizes}
    for budget in budgets:
        held = kept.kept_bytes()
        network = make_network(width, budget)
        row: dict[str, Any] = {
            "budget": budget,
            "cells": sum(len(layers[0].warehouse.cells) for layers in stages(network)),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "kept": kept_by(network, images["training"]) / base,
        }
        for mode, work in (("training", train), ("inference", infer)):
            best: dict[str, float] = {}
            for turn in range(rounds + 1):  # the first one warms up
                for way in ways[mode]:
                    if turn > 1 and best[way] > SLOWEST * best["static"]:
                        continue
                    with bases(WAYS.get(way, "never")):
                        start = time.perf_counter()
                        work(static if way == "static" else network, images[mode])
                        seconds = time.perf_counter() - start
                    best[way] = min(seconds, best[way]) if turn > 1 else seconds
            row[mode] = {way: best[way] / best["static"] for way in ways[mode][1:]}
            ways[mode] = [way for way in ways[mode] if best[way] <= SLOWEST * best["static"]]
        row["bases"] = (kept.kept_bytes() - held) / parameter_bytes
        del network
        gc.collect()  # and the bases with it
        yield row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory relative to the static network's over the number of cells."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    cells = [row["cells"] for row in rows]
    for mode, axis in zip(("training", "inference"), axes, strict=False):
        for way in WAYS:
            found = [row[mode].get(way) for row in rows]
            axis.plot(cells, found, marker="o", label=way)
        axis.set(title=f"time, {mode}", yscale="log", ylim=(0.9, None))
    axes[2].plot(cells, [row["kept"] for row in rows], marker="o", label="kept for the backward pass / static's")
    axes[2].plot(cells, [row["bases"] for row in rows], marker="o", label="bases in evaluation / static weights")
    axes[2].set(title="memory", yscale="log")
    for axis in axes:
        axis.set(xlabel="cells", xscale="log")
        axis.set_xticks(cells, [f"{count:,}" for count in cells])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", frameon=False)
    for axis in axes:
        axis.set_ylabel("static network = 1")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="16 channels, smaller batches, two rounds")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file for the plot")
    options = parser.parse_args()
    sizes = (
        {"training": (32, 16), "inference": (32, 16)}
        if options.quick
        else {"training": (128, 32), "inference": (32, 64)}
    )
    width, rounds = (16, 2) if options.quick else (options.width, options.rounds)
    machine = str(describe_machine(torch.device("cpu"), torch.float32))
    rows: list[dict[str, Any]] = []
    result = {"machine": machine, "width": width, "sizes": sizes, "rounds": rounds, "rows": rows}
    for row in measure(width, options.budgets, sizes, rounds):
        rows.append(row)
        times = " ".join(f"{mode} {ratio:.2f} {way}," for mode in sizes for way, ratio in row[mode].items())
        counts = f"{row['cells']:,} cells, {row['parameters']:,} parameters"
        held = f"kept {row['kept']:.2f}, bases {row['bases']:.1f}"
        print(f"{row['budget']:g}×: {counts}, {times} {held}", flush=True)
        if options.output is not None:  # after every row, since the last ones take longest
            options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if options.plot is not None:
            plot(rows, options.plot)


if __name__ == "__main__":
    main()
