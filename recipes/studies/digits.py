"""KernelWarehouse against static networks on the handwritten digits: 8 networks, 2 settings, 5 seeds.

    python recipes/studies/digits.py                    # all of it: the better part of an hour on one idle core
    python recipes/studies/digits.py --seeds 1 --epochs 1   # a look, in a minute

Writes one result after the other to `digits.json` beside it, goes on where it stopped, and prints the README's table.
Every run is one of `kw-fit`: the table's rows are `kw-fit RECIPE KEY=VALUE…` with what stands below. A sixth of the
training images validates; the test images are opened once a run, for the epoch with the highest validation accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from kw_lightning.fit import fit
from kw_lightning.sweep.parent import VARIABLE, end_with_parent
from kw_lightning.sweep.statistics import points, summarize

NETWORKS: dict[str, list[str]] = {
    "static": ["digits-resnet-static"],
    "1/2×": ["digits-resnet-half"],
    "1×": ["digits-resnet"],
    "4×": ["digits-resnet-4x"],
    "1×, no annealing (τ = 0 from the start)": ["digits-resnet", "temperature.start=0"],
    "static, as large as 1/2×": ["digits-resnet-static", "vars.stem=14", "vars.first=28", "vars.second=55"],
    "static, as large as 1×": ["digits-resnet-static", "vars.stem=18", "vars.first=38", "vars.second=77"],
    "static, as large as 4×": ["digits-resnet-static", "vars.stem=37", "vars.first=75", "vars.second=151"],
}
SETTINGS: dict[str, list[str]] = {
    "1,000 images": [],
    "200 images, moved and noisy": [
        "data.train.samples=200",
        "data.batch_size=20",
        "data.train.shift=1",
        "data.train.noise=0.3",
        "data.eval.shift=1",
        "data.eval.noise=0.3",
        "train.epochs=60",
        "temperature.epochs=15",
    ],
}


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="fewer epochs than the recipes' own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    options = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    known = {(result["network"], result["setting"], result["seed"]) for result in results}
    os.environ[VARIABLE] = str(os.getpid())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=end_with_parent) as pool:
        runs = {
            pool.submit(run, *key, options.epochs): key
            for seed in range(options.seeds)
            for setting in SETTINGS
            for network in NETWORKS
            if (key := (network, setting, seed)) not in known
        }
        for ended in as_completed(runs):
            results.append(dict(zip(("network", "setting", "seed"), runs[ended], strict=True)) | ended.result())
            options.results.write_text(json.dumps(sorted(results, key=place), indent=1, ensure_ascii=False) + "\n")
    print(table(results))


def place(result: dict[str, Any]) -> tuple[int, int, int]:
    """Return where a result stands in the file, whichever run ended first."""
    return result["seed"], list(SETTINGS).index(result["setting"]), list(NETWORKS).index(result["network"])


def run(network: str, setting: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train one network and return its parameters and its test metrics at the epoch that validation chose."""
    torch.set_num_threads(1)
    recipe, *changes = NETWORKS[network]
    changes = [*changes, *SETTINGS[setting], f"train.seed={seed}", "log.tensorboard=false", "log.report=false"]
    if epochs is not None:
        changes.append(f"train.epochs={epochs}")
    with tempfile.TemporaryDirectory() as folder:
        result = fit(recipe, changes, output=Path(folder) / "run")
    parameters = sum(parameter.numel() for parameter in result.module.network.parameters())
    return {"parameters": parameters, **result.test}


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table: mean ± sample standard deviation of the test accuracy over the seeds."""
    counts = {setting: count_seeds(results, setting) for setting in SETTINGS}
    heads = [f"{setting}, {count} seed{'s' * (count != 1)}" for setting, count in counts.items()]
    lines = [f"| network | parameters | {' | '.join(heads)} |", "| --- | ---: | ---: | ---: |"]
    for network in NETWORKS:
        own = [result for result in results if result["network"] == network]
        cells = []
        for setting in SETTINGS:
            values = [
                100 * result["accuracy"]
                for result in own
                if result["setting"] == setting and result["seed"] < counts[setting]
            ]
            found = summarize(values)
            cells.append("" if found is None else found.text(points))
        if own:
            lines.append(f"| {network} | {own[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def count_seeds(results: list[dict[str, Any]], setting: str) -> int:
    """Return the number of seeds, from 0 on, that every network of a setting has been trained with."""
    seeds = [{r["seed"] for r in results if (r["network"], r["setting"]) == (network, setting)} for network in NETWORKS]
    return next(seed for seed in itertools.count() if any(seed not in found for found in seeds))


if __name__ == "__main__":
    main()
