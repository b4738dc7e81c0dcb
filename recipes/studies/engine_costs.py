"""Time every path of the engine on layers of the shipped networks, and fit the planner's seconds per unit of work.

    python recipes/studies/engine_costs.py --output costs.json

takes about a quarter of an hour on two idle cores. It prints the table `SECONDS` of kw_lightning/nn/engine/costs.py as
fitted here, how far the fit misses the times, and how much slower than the fastest path the planner's choices are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path

import torch
from torch import Tensor

from kw_lightning.bench import describe_machine
from kw_lightning.nn.clock import elapsed
from kw_lightning.nn.engine import Convolution, costs, paths

CPU = torch.device("cpu")
# (in, out, kernel, map at 224², stride, cell, cells)
LAYERS = (
    (64, 64, 3, 56, 1, (64, 64), 56),
    (64, 128, 3, 56, 2, (64, 64), 56),
    (64, 128, 1, 56, 2, (64, 64), 56),
    (128, 128, 3, 28, 1, (128, 128), 47),
    (128, 256, 3, 28, 2, (128, 128), 47),
    (256, 256, 3, 14, 1, (256, 256), 47),
    (256, 256, 3, 14, 1, (256, 256), 188),
    (256, 512, 3, 14, 2, (256, 256), 47),
    (256, 512, 1, 14, 2, (256, 256), 47),
    (512, 512, 3, 7, 1, (512, 512), 27),
    (512, 512, 3, 7, 1, (512, 512), 7),
    (64, 256, 1, 56, 1, (64, 64), 87),
    (512, 128, 1, 28, 1, (128, 128), 104),
    (256, 1024, 1, 14, 1, (256, 256), 138),
    (2048, 512, 1, 7, 1, (512, 512), 47),
    (512, 2048, 1, 7, 1, (512, 512), 47),
    (144, 24, 1, 56, 1, (24, 24), 30),
    (32, 192, 1, 28, 1, (32, 32), 40),
    (384, 96, 1, 14, 1, (96, 64), 60),
    (160, 960, 1, 7, 1, (160, 160), 24),
    (384, 1536, 1, 14, 1, (384, 384), 72),
)
INPUTS = ((16, 224), (1, 224), (64, 32), (3, 96), (16, 64))  # (batch, size)
MOST_WORK = 8  # a path of this many times the multiply-adds of another is not timed
SLOWEST = 4  # nor one again that was this many times slower than another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="Rounds; the medians are taken.")
    parser.add_argument("--output", type=Path, help="File for the times, as JSON.")
    parser.add_argument("--times", type=Path, help="Fit to the times of this file instead of measuring.")
    arguments = parser.parse_args()
    times = json.loads(arguments.times.read_text()) if arguments.times else measure(arguments.repeats)
    if arguments.output:
        arguments.output.write_text(json.dumps(times))
    fit(times)


def problems() -> Iterator[tuple[Convolution, int, tuple[int, int], int]]:
    """Yield (geometry, batch, map, cells), each once."""
    seen = set()
    for layer, (batch, size) in itertools.product(LAYERS, INPUTS):
        inputs, outputs, kernel, side, stride, cell, cells = layer
        side = max(1, math.ceil(side * size / 224))
        geometry = Convolution(
            (outputs, inputs, kernel, kernel), (*cell, 1, 1), (stride,) * 2, (kernel // 2,) * 2, (1, 1)
        )
        if (problem := (geometry, batch, (side, side), cells)) not in seen:
            seen.add(problem)
            yield problem


def measure(repeats: int) -> list[dict[str, object]]:
    """Return the median seconds of every path and pass on every problem."""
    print(describe_machine(CPU, torch.float32))
    results = []
    for index, (geometry, batch, size, cells) in enumerate(problems()):
        mixtures = math.prod(geometry.kernel_shape) // math.prod(geometry.cell_shape)
        x = torch.randn(batch, geometry.kernel_shape[1], *size)
        attention = torch.randn(batch, mixtures, cells) / cells
        stored = torch.randn(cells, *geometry.cell_shape)
        seconds = {
            name: timed(geometry, (x, attention, stored), backward, repeats)
            for name, backward in (("forward", False), ("backward", True))
        }
        results.append({"problem": index, **seconds})
        print(index, geometry.kernel_shape, batch, size, cells, seconds, flush=True)
    return results


def timed(
    geometry: Convolution, tensors: tuple[Tensor, Tensor, Tensor], backward: bool, repeats: int
) -> dict[str, float]:
    """Return the median seconds of one pass by every path that is not much slower than the best."""
    able = [path for path in costs.SECONDS if paths.refusal(path, geometry, torch.float32, CPU) is None]
    problem = geometry, len(tensors[0]), tuple(tensors[0].shape[2:]), len(tensors[2])
    work_of_path = {path: (work := work_of(path, problem)).mixing + work.products for path in able}
    able = [path for path in able if work_of_path[path] <= MOST_WORK * min(work_of_path.values())]
    gradient = torch.randn_like(paths.empty_output(tensors[0], geometry))
    rounds: dict[str, list[float]] = {path: [] for path in able}
    for repeat in range(repeats + 1):
        for path in able:
            best = min((min(times) for times in rounds.values() if times), default=math.inf)
            if repeat > 1 and min(rounds[path]) > SLOWEST * best:
                continue

            def work(path: str = path) -> object:
                if backward:
                    return paths.backward(gradient, *tensors, geometry, path, [True] * 3)
                return paths.forward(*tensors, geometry, path)

            seconds = elapsed(work, CPU)
            if repeat:
                rounds[path].append(seconds)
    return {path: statistics.median(times) for path, times in rounds.items()}


def fit(times: list[dict[str, object]]) -> None:
    """Print the fitted table and what it is worth."""
    found = list(problems())
    table: dict[str, tuple[costs.Work, costs.Work]] = {}
    for path in costs.SECONDS:
        units = []
        for name in ("forward", "backward"):
            rows, goal = [], []
            for entry in times:
                if path in entry[name]:
                    rows.append(astuple(work_of(path, found[entry["problem"]])))
                    goal.append(entry[name][path])
            unit = least_squares(torch.tensor(rows, dtype=torch.float64), torch.tensor(goal, dtype=torch.float64))
            miss = (torch.tensor(rows, dtype=torch.float64) @ unit / torch.tensor(goal) - 1).abs()
            median, most = miss.median(), miss.quantile(0.9)
            print(f"{path:13} {name:8} misses {median:4.0%} in the median, {most:4.0%} in nine of ten")
            units.append(costs.Work(*(float(f"{number:.2g}") for number in unit)))
        table[path] = (units[0], units[1])
    for path, both in table.items():
        print(f'    "{path}": ({", ".join("Work(" + ", ".join(f"{v:g}" for v in astuple(u)) + ")" for u in both)}),')
    for name, backward in (("forward", False), ("backward", True)):
        ratios = []
        for entry in times:
            problem = found[entry["problem"]]
            chosen = min(entry[name], key=lambda path: cost(table, path, problem, backward))
            ratios.append((entry[name][chosen] / min(entry[name].values()), entry["problem"], chosen))
        slow = sorted(ratios, reverse=True)
        print(f"{name}: {sum(r > 1.25 for r, *_ in ratios)} of {len(ratios)} choices over 1.25 × the fastest; worst:")
        for ratio, index, chosen in slow[:8]:
            print(f"    {ratio:.2f} × by {chosen} on {found[index]}: {times[index][name]}")


def work_of(path: str, problem: tuple[Convolution, int, tuple[int, int], int]) -> costs.Work:
    geometry, batch, size, cells = problem
    return costs.count_work(path, geometry, batch, size, cells, 4, CPU)


def cost(table: dict, path: str, problem: tuple[Convolution, int, tuple[int, int], int], backward: bool) -> float:
    work, unit = work_of(path, problem), table[path][backward]
    return sum(getattr(work, field.name) * getattr(unit, field.name) for field in fields(costs.Work))


def least_squares(rows: Tensor, goal: Tensor) -> Tensor:
    """Return the units, none negative, that miss the times by the least relative squares: the best of all subsets."""
    scaled, ones = rows / goal.unsqueeze(1), torch.ones_like(goal)
    best, least = torch.zeros(rows.shape[1], dtype=rows.dtype), math.inf
    for count in range(1, rows.shape[1] + 1):
        for columns in itertools.combinations(range(rows.shape[1]), count):
            part = scaled[:, list(columns)]
            norms = part.norm(dim=0)
            if (norms == 0).any():
                continue
            units = torch.linalg.lstsq(part / norms, ones.unsqueeze(1)).solution.squeeze(1) / norms
            miss = (part @ units - ones).square().sum().item()
            if (units >= 0).all() and miss < least:
                best, least = torch.zeros(rows.shape[1], dtype=rows.dtype), miss
                best[list(columns)] = units
    return best


if __name__ == "__main__":
    main()
