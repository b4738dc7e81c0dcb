"""Where a network that was trained with static kernels goes on from: 12 starts, 5 seeds, on the handwritten digits.

    python recipes/studies/warm_start.py            # all of it: about half an hour on one idle core
    python recipes/studies/warm_start.py --seeds 1 --epochs 1   # a look, in two minutes

For each seed a static network is trained on the digits, moved and noisy. From its weights, or from fresh ones ("from
scratch"), every row then trains for as many epochs again, at the same rate, on the same images in the same order; what
follows from the order of the rows is the difference to the static network that goes on. Nothing is chosen by these
figures: settings are those of the recipes. Writes to `warm_start.json` beside it, goes on where it stopped, and prints
a table: mean ± sample standard deviation over the seeds, and the mean difference with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from kw_lightning.fit import fit
from kw_lightning.nn import KWLayer, warehouses
from kw_lightning.sweep.statistics import paired_difference, points, summarize

SETTING = [
    "data.validation=none",
    "data.train.shift=1",
    "data.train.noise=0.5",
    "data.eval.shift=1",
    "data.eval.noise=0.5",
]
ANNEALED, AT_ONCE = "temperature.start=1", "temperature.start=0"
REFERENCE = "static, goes on"


class OtherCells(Callback):
    """Starts the cells that no mixture starts as otherwise than at random.

    Args:
        start: "copies" of the cells that mixtures start as, with a tenth of their spread as noise, **or** the
            "differences" of two such cells drawn at random.
    """

    def __init__(self, start: str) -> None:
        self.start = start

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the cells."""
        layers = [layer for layer in pl_module.modules() if isinstance(layer, KWLayer)]
        for warehouse in warehouses(pl_module).values():
            partitions = [layer.partition for layer in layers if layer.warehouse is warehouse and layer.partition]
            used = sorted({cell for partition in partitions for cell in partition.initial_cells})
            others = sorted(set(range(len(warehouse.cells))) - set(used))
            first, second = (warehouse.cells[random.choices(used, k=len(others))] for _ in range(2))
            noise = 0.1 * first.std() * torch.randn_like(first)
            warehouse.cells[others] = first + noise if self.start == "copies" else first - second


def other_cells(start: str) -> str:
    """Return the change to a recipe that starts the other cells so."""
    return f"callbacks=[{{'python:warm_start:OtherCells': {{start: {start}}}}}]"


NETWORKS: dict[str, tuple[str, bool, list[str]]] = {
    REFERENCE: ("digits-resnet-static", True, []),
    "1/2×, warm": ("digits-resnet-half", True, [AT_ONCE]),
    "1/2×, warm, annealed (half of the mixtures begin as zeros)": ("digits-resnet-half", True, [ANNEALED]),
    "1/2×, from scratch": ("digits-resnet-half", False, []),
    "1×, warm, annealed": ("digits-resnet", True, [ANNEALED]),
    "1×, warm, at τ = 0 from the start": ("digits-resnet", True, [AT_ONCE]),
    "1×, from scratch": ("digits-resnet", False, []),
    "4×, warm, annealed": ("digits-resnet-4x", True, [ANNEALED]),
    "4×, warm, annealed, other cells copies with noise": ("digits-resnet-4x", True, [ANNEALED, other_cells("copies")]),
    "4×, warm, annealed, other cells differences": ("digits-resnet-4x", True, [ANNEALED, other_cells("differences")]),
    "4×, warm, at τ = 0 from the start": ("digits-resnet-4x", True, [AT_ONCE]),
    "4×, from scratch": ("digits-resnet-4x", False, []),
}


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="of the static network, and of each row after it")
    options = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    for seed in range(options.seeds):
        missing = [name for name in NETWORKS if not any((r["network"], r["seed"]) == (name, seed) for r in results)]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "static"
            train("digits-resnet-static", seed, options.epochs, source)
            for name in missing:
                recipe, warm, changes = NETWORKS[name]
                if warm:
                    changes = [*changes, f"model.pretrained={source / 'model' / 'model.safetensors'}"]
                found = train(recipe, 100 + seed, options.epochs, Path(folder) / f"row-{missing.index(name)}", *changes)
                results.append({"network": name, "seed": seed, "epochs": options.epochs, **found})
                options.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))


def train(recipe: str, seed: int, epochs: int, output: Path, *changes: str) -> dict[str, Any]:
    """Train one network and return its parameters and its test metrics after the last epoch."""
    options = [*SETTING, *changes, f"train.seed={seed}", f"train.epochs={epochs}", "log.tensorboard=false"]
    result = fit(recipe, options, output=output, allow_python=["warm_start"])
    return {"parameters": sum(parameter.numel() for parameter in result.module.network.parameters()), **result.test}


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, over the seeds that every network has been trained with."""
    by_name = {name: {r["seed"]: 100 * r["accuracy"] for r in results if r["network"] == name} for name in NETWORKS}
    seeds = sorted(set.intersection(*(set(found) for found in by_name.values())))
    lines = [
        f"| network, {len(seeds)} seeds | parameters | accuracy | against the first row |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found in by_name.items():
        parameters = next((r["parameters"] for r in results if r["network"] == name), 0)
        summary = summarize([found[seed] for seed in seeds])
        beside = paired_difference(by_name[REFERENCE], {seed: found[seed] for seed in seeds})
        texts = "" if summary is None else summary.text(points), "" if beside is None else beside.text(points)
        lines.append(f"| {name} | {parameters:,} | {texts[0]} | {'' if name == REFERENCE else texts[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
