"""KernelWarehouse against static networks on Fashion-MNIST: 70,000 real images, 3 networks, 18 rows, 5 seeds.

    python recipes/studies/fashion.py --root ~/data           # all of it: days of one core; it goes on where it stopped
    python recipes/studies/fashion.py --root ~/data --quick   # a look that says nothing, in under ten minutes

The protocol was laid down before the first run. The usual files lie in ROOT/FashionMNIST/raw (Debian's package
`dataset-fashion-mnist` has them). 55,000 images train, 5,000 validate, evenly from every class, and 10,000 test.

1. Annealing: its share of the run, the same for all annealed rows of a network, is the one of `SHARES` with the highest
   mean validation accuracy of KW 1/4×, 1/2×, 1× and 4×, at the middle rate, seed 100.
2. Rate: each row has the one of `RATES` with its highest validation accuracy, seed 100.
3. Test: seeds 0 to 4, each with its own split, order and start, the same for every row. The test images are opened once
   a run, for the epoch with the highest validation accuracy; the runs of 1 and 2 never open them.

Static networks "as large as" a row have its parameters (attention counted), those "as costly as" its multiply-adds, by
a common factor of all widths. `CLAIMS` stand below, written before the runs. Every run is one of `kw-fit`. Each is
written to `fashion.json`, which so holds all there are; tables show mean ± sample standard deviation over the seeds,
and the paired difference to the static network with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from kw_lightning.callbacks.figures import drawing, spread_sizes
from kw_lightning.fit import fit
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe
from kw_lightning.sweep.parent import VARIABLE, end_with_parent
from kw_lightning.sweep.statistics import Difference, paired_difference, points, summarize

RATES = (1e-3, 3e-3, 1e-2)
SHARES = (0.1, 0.2, 0.4, 0.6)
CHOOSING_SEED = 100
SEEDS = range(5)
STATIC = "static"
BUDGETS = ("1/4", "1/2", "1", "4")

SEPARABLE = [
    {"DepthwiseConv2D": {"kernel_size": 3, "strides": "$strides", "padding": "same", "use_bias": False}},
    *({"BatchNormalization": {"momentum": 0.9}}, "ReLU"),
    {"Conv2D": {"filters": "$filters", "kernel_size": 1, "use_bias": False, "warehouse": "$warehouse"}},
    *({"BatchNormalization": {"momentum": 0.9}}, "ReLU"),
]
INVERTED = [
    {"Conv2D": {"filters": "$hidden", "kernel_size": 1, "use_bias": False, "warehouse": "$warehouse"}},
    *({"BatchNormalization": {"momentum": 0.9}}, "ReLU"),
    {"DepthwiseConv2D": {"kernel_size": 3, "strides": "$strides", "padding": "same", "use_bias": False}},
    *({"BatchNormalization": {"momentum": 0.9}}, "ReLU"),
    {"Conv2D": {"filters": "$filters", "kernel_size": 1, "use_bias": False, "warehouse": "$project"}},
    {"BatchNormalization": {"name": "main", "momentum": 0.9}},
]


@dataclass(frozen=True)
class Block:
    """A block of a network: its kind, output channels, stride and the warehouse of its pointwise layers."""

    kind: str
    filters: int
    strides: int
    warehouse: str


def _separable(filters: int, strides: int, warehouse: str) -> Block:
    return Block("separable", filters, strides, warehouse)


_PARAMETERS: dict[str, Any] = {"filters": None, "strides": 1}
_HIDDEN = {**_PARAMETERS, "hidden": None, "project": None}
BLOCKS: dict[str, dict[str, Any]] = {
    "separable": {"parameters": _PARAMETERS, "layers": SEPARABLE},
    "inverted": {"parameters": _HIDDEN, "layers": INVERTED},
    "residual": {"parameters": _HIDDEN, "layers": [*INVERTED, {"Add": {"inputs": ["main", "input"]}}]},
}
"""Blocks of the recipe language by their kind."""

NETWORKS: dict[str, tuple[int, list[Block]]] = {
    "separable": (
        16,
        [
            _separable(32, 2, "first"),
            *([_separable(32, 1, "first")] * 3),
            _separable(64, 2, "second"),
            _separable(64, 1, "second"),
        ],
    ),
    "inverted": (
        16,
        [
            _separable(32, 2, "first"),
            Block("inverted", 32, 2, "second"),
            *([Block("residual", 32, 1, "second")] * 2),
        ],
    ),
    "wide": (
        32,
        [
            _separable(64, 2, "first"),
            *([_separable(128, 1, "first")] * 2),
            _separable(256, 2, "second"),
            _separable(256, 1, "second"),
        ],
    ),
}
"""Name → channels of the stem, and blocks: a tiny one, one of like cost, and one whose cells outweigh the attention."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        budget: of the warehouses; none of them is there without it.
        annealed: whether τ falls from 1, over the chosen share of the run.
        warehouse: other keys of the warehouses.
        alone: every layer has a warehouse of its own, of whole kernels.
        like: (what, row): as many "parameters" or "macs" as that row, by the widths of a static network or by the
            number of cells where layers are `alone`.
    """

    budget: str | None = None
    annealed: bool = True
    warehouse: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    like: tuple[str, str] | None = None


ROWS: dict[str, Row] = {
    STATIC: Row(),
    **{f"KW {budget}×": Row(budget) for budget in BUDGETS},
    **{f"static, as large as KW {budget}×": Row(like=("parameters", f"KW {budget}×")) for budget in BUDGETS},
    **{f"static, as costly as KW {budget}×": Row(like=("macs", f"KW {budget}×")) for budget in BUDGETS},
    "KW 1×, no annealing (τ = 0 from the start)": Row("1", annealed=False),
    "KW 1×, alike for all samples": Row("1", warehouse={"dynamic": False}),
    "KW 1×, softmax": Row("1", warehouse={"attention": {"function": "softmax"}}),
    "DY-Conv, as large as KW 4×": Row(
        annealed=False,
        warehouse={"attention": {"function": "softmax", "softmax_temperature": {}, "start": "none"}},
        alone=True,
        like=("parameters", "KW 4×"),
    ),
    "CondConv, as large as KW 4×": Row(
        annealed=False,
        warehouse={"attention": {"function": "sigmoid", "start": "none"}},
        alone=True,
        like=("parameters", "KW 4×"),
    ),
}


@dataclass(frozen=True)
class Claim:
    """A claim, written before the runs: a row is so many points above another, over the seeds.

    Attributes:
        size: the largest share of the other row's parameters that the row may have; None for any.
    """

    networks: tuple[str, ...]
    row: str
    other: str
    points: float
    size: float | None = None


CLAIMS = (
    Claim(("separable", "inverted"), "KW 4×", STATIC, 0.5),
    Claim(("separable", "inverted"), "KW 1×", STATIC, 0.2),
    Claim(("wide",), "KW 1/2×", STATIC, -0.1, size=0.6),
    Claim(("wide",), "KW 1/4×", STATIC, -0.1, size=0.6),
    Claim(("separable", "inverted", "wide"), "KW 1×", "KW 1×, no annealing (τ = 0 from the start)", 1.0),
)


@dataclass(frozen=True)
class Run:
    """One training, by what it follows from.

    Attributes:
        share: of the run over which τ falls, 0 for a row without annealing.
        test: whether the test images are opened at its end.
    """

    network: str
    row: str
    rate: float
    share: float
    seed: int
    test: bool


@dataclass(frozen=True)
class Length:
    """How long the runs are: `samples` images (None for all) in batches of 128, for some epochs; 8 are 3,440 steps."""

    epochs: int = 8
    samples: int | None = None


QUICK = Length(epochs=1, samples=5_000)


def recipe_of(network: str, row: Row, scale: float = 1.0) -> dict[str, Any]:
    """Return the recipe of a row's network.

    Args:
        network: its name.
        row: the row.
        scale: factor of all widths; where the row's layers are alone, their number of cells.
    """
    stem, blocks = NETWORKS[network]
    factor = 1.0 if row.alone else scale

    def channels(count: int) -> int:
        return max(1, round(count * factor))

    layers: list[Any] = [
        {"Conv2D": {"filters": channels(stem), "kernel_size": 3, "strides": 2, "padding": "same", "use_bias": False}},
        *({"BatchNormalization": {"momentum": 0.9}}, "ReLU"),
    ]
    before, warehouses = stem, {}
    for number, block in enumerate(blocks):
        first, second = (
            f"{block.warehouse}{number}{end}" if row.alone else block.warehouse for end in ("", "_project")
        )
        arguments = {"filters": channels(block.filters), "strides": block.strides, "warehouse": first}
        warehouses[first] = {}
        if block.kind != "separable":
            arguments |= {"hidden": channels(2 * before), "project": second}
            warehouses[second] = {}
        layers.append({block.kind: arguments})
        before = block.filters
    recipe: dict[str, Any] = {
        "kw": 1,
        "name": f"fashion-{network}",
        "model": {
            "input": [1, 28, 28],
            "blocks": {kind: BLOCKS[kind] for kind in {block.kind for block in blocks}},
            "layers": [*layers, "GlobalAveragePooling2D", {"Dense": {"units": 10}}],
        },
    }
    attention = {"at_most": 1000, **row.warehouse.get("attention", {})}
    if row.alone:
        recipe["defaults"] = {
            **row.warehouse,
            "budget": int(scale),
            "cell": {"out": 1, "in": 1},
            "attention": attention,
        }
        recipe["warehouses"] = warehouses
    elif row.budget is not None:
        budget = int(row.budget) if row.budget.isdigit() else row.budget
        cell = {"out": "1/2", "in": "1/2"}
        recipe["defaults"] = {**row.warehouse, "budget": budget, "cell": cell, "attention": attention}
        recipe["warehouses"] = warehouses
    return recipe


@cache
def scale_of(network: str, row: str) -> float:
    """Return the scale by which a row is as large, or as costly, as the row that it is like."""
    found = ROWS[row]
    if found.like is None:
        return 1.0
    what, other = found.like
    wanted = count(recipe_of(network, ROWS[other]), what)
    low, high = (1.0, 64.0) if found.alone else (0.2, 16.0)
    smallest = 1.0 if found.alone else 1 / 256

    def distance(scale: float) -> int:
        return count(recipe_of(network, found, scale), what) - wanted

    while high - low > smallest:  # both grow with the scale
        middle = (low + high) / 2 // smallest * smallest
        low, high = (middle, high) if distance(middle) < 0 else (low, middle)
    return min(low, high, key=lambda scale: abs(distance(scale)))


def count(recipe: dict[str, Any], what: str) -> int:
    """Return the parameters, **or** the multiply-adds of one image ("macs"), of a recipe's network."""
    planned = plan(load_recipe(recipe))
    found = planned.parameters if what == "parameters" else planned.macs
    assert found is not None
    return int(found.kw)


def take_place(places: Queue[str]) -> None:
    """Take the accelerator that this process trains on, the first one that is left, and end with the study."""
    end_with_parent()
    os.environ["FASHION_ACCELERATOR"] = places.get()


def train(run: Run, length: Length, root: str) -> dict[str, Any]:
    """Train a network; return its accuracies in percent, size, cost, time and where that was."""
    torch.set_num_threads(1)
    accelerator = os.environ["FASHION_ACCELERATOR"]
    recipe = recipe_of(run.network, ROWS[run.row], scale_of(run.network, run.row))
    size, cost = count(recipe, "parameters"), count(recipe, "macs")
    if "warehouses" in recipe:
        epochs = run.share * length.epochs
        recipe["temperature"] = {"end": 0, "epochs": epochs} if epochs else {"start": 0, "end": 0}
    recipe["data"] = {
        "name": "fashion_mnist",
        "root": root,
        "batch_size": 128,
        "eval_batch_size": 1000,
        "validation": "1/12",
        "test": run.test,
        "train": {"mean": [0.286], "std": [0.353], "flip": True, "shift": 2},
    }
    if length.samples is not None:
        recipe["data"]["train"]["samples"] = length.samples
    recipe["train"] = {
        "epochs": length.epochs,
        "optimizer": {"name": "AdamW", "lr": run.rate, "weight_decay": 0.05},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "seed": run.seed,
        "accelerator": accelerator,
        "channels_last": True,
    }
    recipe["log"] = {"tensorboard": False, "report": False, "every_n_steps": 50}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = fit(recipe, output=Path(folder) / "run")
    found = {"validation": 100 * result.best["accuracy"], "parameters": size, "macs": cost, "on": accelerator}
    if run.test:
        found["test"] = 100 * result.test["accuracy"]
    return found | {"seconds": round(time.perf_counter() - start, 1)}


class Study:
    """The runs there are, in a file, and what follows from them.

    Args:
        path: the file.
        length: of each run.
        root: of the data.
        places: an accelerator for each run at a time, taken in this order.
    """

    def __init__(self, path: Path, length: Length, root: str, places: Sequence[str]) -> None:
        self.path, self.length, self.root, self.places = path, length, root, places
        written = json.loads(path.read_text()) if path.exists() else []
        self.found: dict[Run, dict[str, Any]] = {
            Run(**entry["run"]): entry["found"] for entry in written if entry["length"] == asdict(length)
        }
        self.others = [entry for entry in written if entry["length"] != asdict(length)]

    def make(self, runs: Sequence[Run]) -> None:
        """Make the runs that are not there yet, and write each down as it ends."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.found]
        context = multiprocessing.get_context("spawn")
        places = context.Queue()
        for place in self.places:
            places.put(place)
        with ProcessPoolExecutor(
            len(self.places), mp_context=context, initializer=take_place, initargs=(places,)
        ) as pool:
            futures = {pool.submit(train, run, self.length, self.root): run for run in missing}
            try:
                for future in as_completed(futures):
                    self.found[futures[future]] = future.result()
                    self.write()
                    print(f"{futures[future]}: {self.found[futures[future]]}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def write(self) -> None:
        """Write all runs, in an order that does not follow from which ended first."""
        own = [
            {"run": asdict(run), "length": asdict(self.length), "found": self.found[run]}
            for run in sorted(self.found, key=lambda run: str(asdict(run)))
        ]
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in [*self.others, *own])
        beside = self.path.with_suffix(".tmp")
        beside.write_text(f"[\n{lines}\n]\n")
        beside.replace(self.path)

    def validation(self, run: Run) -> float:
        """Return a run's validation accuracy."""
        accuracy: float = self.found[run]["validation"]
        return accuracy


def annealing_runs(network: str, share: float) -> list[Run]:
    """Return the runs by which a share of annealing is judged."""
    return [Run(network, f"KW {budget}×", RATES[1], share, CHOOSING_SEED, test=False) for budget in BUDGETS]


def choose_share(study: Study, network: str) -> float:
    """Return the share of annealing with the highest mean validation accuracy over the four budgets."""
    study.make([run for share in SHARES for run in annealing_runs(network, share)])
    return max(SHARES, key=lambda share: statistics.mean(map(study.validation, annealing_runs(network, share))))


def chosen_runs(study: Study, network: str, rows: Sequence[str], share: float) -> Iterator[Run]:
    """Yield, for each row, the run of seed 100 with the rate of its highest validation accuracy."""
    shares = {row: share if ROWS[row].budget is not None and ROWS[row].annealed else 0.0 for row in rows}
    runs = {row: [Run(network, row, rate, shares[row], CHOOSING_SEED, test=False) for rate in RATES] for row in rows}
    study.make([run for row in rows for run in runs[row]])
    for row in rows:
        yield max(runs[row], key=study.validation)


def tested_runs(chosen: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """Return the runs whose test images are opened."""
    return [replace(run, seed=seed, test=True) for seed in seeds for run in chosen]


def table(study: Study, network: str, seeds: Sequence[int]) -> str:
    """Return a network's results as a Markdown table, over the seeds that each row has."""
    lines = [
        f"### {network}",
        "",
        "| row | parameters | multiply-adds | rate | annealed | seeds | test accuracy | to static, 95 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        runs = tested(study, network, row, seeds)
        if not runs:
            continue
        one = next(iter(runs.values()))
        found, accuracy = study.found[one], summarize([study.found[run]["test"] for run in runs.values()])
        assert accuracy is not None
        to_static = None if row == STATIC else difference(study, network, row, STATIC, seeds)
        beside = "" if to_static is None else to_static.text(points)
        lines.append(
            f"| {row} | {found['parameters']:,} | {found['macs']:,} | {one.rate:g} | {one.share:.0%} | {len(runs)} "
            f"| {accuracy.text(points)} | {beside} |"
        )
    return "\n".join(lines)


def tested(study: Study, network: str, row: str, seeds: Sequence[int]) -> dict[int, Run]:
    """Return the tested runs of a row by their seed."""
    return {
        run.seed: run
        for run in sorted(study.found, key=lambda run: run.seed)
        if (run.network, run.row, run.test) == (network, row, True) and run.seed in seeds
    }


def difference(study: Study, network: str, row: str, other: str, seeds: Sequence[int]) -> Difference | None:
    """Return how many points of test accuracy a row is above another, over the seeds that both have."""
    own, theirs = (
        {seed: study.found[run]["test"] for seed, run in tested(study, network, name, seeds).items()}
        for name in (row, other)
    )
    return paired_difference(theirs, own)


def draw(study: Study, networks: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw accuracy over parameters and over multiply-adds: KernelWarehouse by its budget, and static networks."""
    from matplotlib.figure import Figure

    with drawing(**{"svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=(8, 3.6 * len(networks)), layout="constrained")
        grid = figure.subplots(len(networks), 2, sharey="row", squeeze=False)
        for axes, (network, what) in zip(
            grid.flat, itertools.product(networks, (("parameters", "as large"), ("macs", "as costly"))), strict=True
        ):
            budgets = [f"KW {budget}×" for budget in BUDGETS]
            lines = {"KernelWarehouse": budgets, STATIC: [STATIC, *(f"static, {what[1]} as {row}" for row in budgets)]}
            for label, rows in lines.items():
                _line(axes, study, network, rows, what[0], label, seeds)
            spread_sizes(axes)
            axes.set_xlabel({"parameters": "parameters", "macs": "multiply-adds of an image"}[what[0]])
            axes.grid(alpha=0.3)
        for first, network in zip(grid[:, 0], networks, strict=True):
            first.set_ylabel(f"{network}: test accuracy, %")
            first.legend()
        figure.savefig(path, metadata={"Date": None})


def _line(
    axes: Any, study: Study, network: str, rows: Sequence[str], what: str, label: str, seeds: Sequence[int]
) -> None:
    """Draw the mean of every row that has runs, with its deviation, in the order of their size."""
    points = []
    for row in rows:
        runs = [study.found[run] for run in tested(study, network, row, seeds).values()]
        accuracy = summarize([found["test"] for found in runs])
        if accuracy is not None:
            points.append((runs[0][what], accuracy.mean, accuracy.deviation or 0.0, row))
    points.sort()
    if not points:
        return
    sizes, means, deviations, names = zip(*points, strict=True)
    axes.errorbar(sizes, means, yerr=deviations, fmt="o-", capsize=3, label=label)
    for size, mean, name in zip(sizes, means, names, strict=True):
        if name.startswith("KW"):
            axes.annotate(name.split()[1], (size, mean), xytext=(4, 5), textcoords="offset points", fontsize="small")


def judged(study: Study, seeds: Sequence[int]) -> str:
    """Return what came of each claim."""
    lines = ["| claim | network | found | |", "| --- | --- | ---: | --- |"]
    for claim in CLAIMS:
        for network in claim.networks:
            found = difference(study, network, claim.row, claim.other, seeds)
            if found is None:
                continue
            own = study.found[next(iter(tested(study, network, claim.row, seeds).values()))]["parameters"]
            theirs = study.found[next(iter(tested(study, network, claim.other, seeds).values()))]["parameters"]
            small = claim.size is None or own <= claim.size * theirs
            reached = "reached" if found.mean >= claim.points and small else "not reached"
            size = (
                "" if claim.size is None else f" with at most {claim.size:.0%} of its parameters ({own / theirs:.0%})"
            )
            text = f"{claim.row} at least {claim.points:+.1f} points from {claim.other}{size}"
            lines.append(f"| {text} | {network} | {found.text(points)} | {reached} |")
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are not there yet, in the order of the protocol, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True, help="folder of FashionMNIST/raw")
    parser.add_argument("--results", type=Path, help="default: fashion.json beside this file")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--gpu-jobs", type=int, default=0, help="and on one GPU, where there is one")
    parser.add_argument("--quick", action="store_true", help="one network, 3 rows, 1 seed, 1 epoch of 5,000 images")
    parser.add_argument("--table", action="store_true", help="print what is there; make no run")
    parser.add_argument("--plot", type=Path, help="also draw accuracy over size and cost, .svg or .png")
    options = parser.parse_args()
    root = str(Path(options.root).expanduser())
    seeds = range(options.seeds)
    os.environ[VARIABLE] = str(os.getpid())
    places = ["cpu"] * options.jobs + ["gpu"] * options.gpu_jobs
    if options.quick:
        print("QUICK: this shows that the study runs. Its figures say nothing of the method.")
        with tempfile.TemporaryDirectory() as folder:
            study = Study(Path(folder) / "quick.json", QUICK, root, places)
            rows = (STATIC, "KW 1×", "KW 4×")
            study.make([Run("separable", row, RATES[1], 0.6 * (row != STATIC), 0, test=True) for row in rows])
            print(table(study, "separable", (0,)))
        return
    study = Study(options.results or Path(__file__).with_suffix(".json"), Length(), root, places)
    for network in options.networks:
        if not options.table:
            share = choose_share(study, network)
            chosen = list(chosen_runs(study, network, options.rows, share))
            study.make(tested_runs(chosen, seeds))
        print(table(study, network, seeds), end="\n\n")
    print(judged(study, seeds))
    if options.plot is not None:
        draw(study, options.networks, seeds, options.plot)


if __name__ == "__main__":
    main()
