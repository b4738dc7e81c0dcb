"""Time every path of the engine on layers of the shipped networks, and fit the planner's seconds per unit of work.

    python recipes/studies/engine_costs.py --output costs.json

takes about half an hour on two idle cores. It prints the `fitted` of every path of kw_lightning/nn/engine/paths as
found here, how far it misses the times, and how much slower than the fastest path the planner's choices are.

A busy machine still tells how two paths compare, since they are timed in turns:

    python recipes/studies/engine_costs.py --paths mix_kernels/{along_rank,compiled} --beside mix_kernels/compiled

fits the first to times in which the second takes what its own `fitted` says. On a GPU, in bfloat16 and in a minute:

    python recipes/studies/engine_costs.py --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path as FilePath

import torch
from torch import Tensor

from kw_lightning.bench import describe_machine
from kw_lightning.nn.attention import attention_width
from kw_lightning.nn.clock import captured, elapsed
from kw_lightning.nn.engine import AttentionFactors, Convolution, computing
from kw_lightning.nn.engine.costs import Fitted, Load, Units, amounts, cpu_seconds, gpu_seconds
from kw_lightning.nn.engine.layouts import empty_output
from kw_lightning.nn.engine.paths import PATHS, Path, find_path
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.planning import plan
from kw_lightning.planning.engine import plan_engine
from kw_lightning.recipe import load_recipe

CPU = torch.device("cpu")
# (in, out, kernel, map at 224², stride, cell, cells); the attention's hidden layer is as wide as of the shipped recipes
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
    (512, 512, 3, 7, 1, (512, 512), 108),
    (64, 64, 3, 56, 1, (64, 64), 224),
    (512, 512, 3, 7, 1, (512, 512), 7),
    (64, 256, 1, 56, 1, (64, 64), 87),
    (512, 128, 1, 28, 1, (128, 128), 104),
    (256, 1024, 1, 14, 1, (256, 256), 138),
    (1024, 256, 1, 14, 1, (256, 256), 552),
    (2048, 512, 1, 7, 1, (512, 512), 47),
    (512, 2048, 1, 7, 1, (512, 512), 47),
    (512, 512, 3, 7, 1, (512, 512), 188),
    (2048, 512, 1, 7, 1, (512, 512), 188),
    (512, 2048, 1, 7, 1, (512, 512), 188),
    (256, 256, 3, 14, 1, (256, 256), 552),
    (144, 24, 1, 56, 1, (24, 24), 30),
    (32, 192, 1, 28, 1, (32, 32), 40),
    (384, 96, 1, 14, 1, (96, 64), 60),
    (160, 960, 1, 7, 1, (160, 160), 24),
    (384, 1536, 1, 14, 1, (384, 384), 72),
)
INPUTS = ((16, 224), (1, 224), (64, 32), (1, 96), (3, 96), (16, 64))  # (batch, size)
GPU_NETWORKS = (
    ("resnet18-kw-1x", 256),
    ("resnet50-kw-1x", 256),
    ("resnet18-kw-4x", 256),
    ("resnet18-kw-1x", 32),
    ("mobilenetv2-100-kw-1x", 256),
)  # (recipe, batch)
MOST_WORK = 8  # a path of this many times the multiply-adds of another is not timed
SLOWEST = 4  # nor one again that was this many times slower than another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="Rounds; the medians are taken.")
    parser.add_argument("--output", type=FilePath, help="File for the times, as JSON.")
    parser.add_argument("--times", type=FilePath, help="Fit to the times of this file instead of measuring.")
    parser.add_argument("--paths", nargs="+", metavar="PATH", help="Time these paths alone.")
    parser.add_argument("--beside", metavar="PATH", help="Take this path's times to be what its units say.")
    parser.add_argument("--device", type=torch.device, default=CPU, help="Where the paths compute: cpu or cuda.")
    arguments = parser.parse_args()
    found = list(problems() if arguments.device.type == "cpu" else gpu_problems(arguments.device))
    if arguments.times:
        times = json.loads(arguments.times.read_text())
    else:
        times = measure(found, arguments.repeats, arguments.paths or [path.name for path in PATHS])
    if arguments.output:
        arguments.output.write_text(json.dumps(times))
    fit(scale(times, find_path(arguments.beside)) if arguments.beside else times, found)


def gpu_problems(device: torch.device) -> Iterator[Problem]:
    """Yield the forward problems of networks at 224², without those of groups."""
    for name, batch in GPU_NETWORKS:
        layers = plan_engine(plan(load_recipe(name), input_shape=(3, 224, 224)), batch, torch.bfloat16, device).layers
        yield from (layer.problem for layer in layers if layer.problem.convolution.groups == 1)


def problems() -> Iterator[Problem]:
    """Yield a CPU's forward problems, each once, with bases that are mixed anew, and kept where batches are small."""
    seen = set()
    for layer, (batch, size) in itertools.product(LAYERS, INPUTS):
        inputs, outputs, kernel, side, stride, cell, cells = layer
        side = max(1, math.ceil(side * size / 224))
        geometry = Convolution(
            (outputs, inputs, kernel, kernel), (*cell, 1, 1), (stride,) * 2, (kernel // 2,) * 2, (1, 1)
        )
        width = attention_width(inputs, Fraction(1, 16))
        problem = Problem(geometry, batch, (side, side), cells, torch.float32, CPU, width=width)
        for posed in (problem, problem._replace(kept=True)):
            if posed not in seen and (not posed.kept or cells > 2 * width):
                seen.add(posed)
                yield posed


def measure(found: Sequence[Problem], repeats: int, names: Sequence[str]) -> list[dict[str, object]]:
    """Return the median seconds of paths, forward and backward, on every problem; of kept bases forward alone."""
    print(describe_machine(found[0].device, found[0].dtype))
    results = []
    for index, problem in enumerate(found):
        seconds = {
            name: {} if problem.kept and backward else timed(problem._replace(backward=backward), repeats, names)
            for name, backward in (("forward", False), ("backward", True))
        }
        results.append({"problem": index, **seconds})
        print(index, problem.convolution.kernel_shape, *problem[1:4], seconds, flush=True)
    return results


def tensors_of(problem: Problem) -> tuple[Tensor, AttentionFactors, Tensor]:
    """Return x, on a GPU channels last, the factors of the attention at temperature 0, and E."""
    convolution, batch, size, cells, dtype, device, *_ = problem
    mixtures = math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)
    x = torch.randn(batch, convolution.kernel_shape[1], *size, device=device, dtype=dtype)
    if not problem.on_cpu and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    columns, width = mixtures * (cells + 1), problem.width or 1
    hidden = torch.randn(batch, width, device=device).relu()
    weight, bias = torch.randn(columns, width, device=device), torch.zeros(columns, device=device)
    initial = torch.full((mixtures,), cells, device=device)
    factors = AttentionFactors(hidden, weight, bias, bias.new_zeros(()), initial, problem.kept)
    return x, factors, torch.randn(cells, *convolution.cell_shape, device=device)


def timed(problem: Problem, repeats: int, names: Sequence[str]) -> dict[str, float]:
    """Return the median seconds of a pass by every path that is not much slower than the best."""
    tensors, geometry = tensors_of(problem), problem.convolution
    x, factors, cells = tensors
    neighbour = replace(factors, weight=factors.weight.clone())  # of another layer of the warehouse, which comes first
    able = [path for path in PATHS if (path.refusal(problem) or path.unsuited(problem)) is None and path.name in names]
    work_of_path = {path: sum(amounts(path.load(problem))[:2]) for path in able}
    most = MOST_WORK * min(work_of_path.values()) if problem.on_cpu else math.inf
    able = [path for path in able if work_of_path[path] <= most]
    gradient = torch.randn_like(empty_output(tensors[0], geometry))

    def work(path: Path) -> object:
        if problem.backward:
            return computing.backward(gradient, *tensors, geometry, path, [True] * 3)
        return computing.forward(*tensors, geometry, path)

    # On a GPU what it computes, not what the CPU takes to start it.
    works = {path: partial(work, path) if problem.on_cpu else captured(partial(work, path)) for path in able}
    rounds: dict[Path, list[float]] = {path: [] for path in able}
    for repeat in range(repeats + 1):
        for path in able:
            best = min((min(times) for times in rounds.values() if times), default=math.inf)
            if repeat > 1 and min(rounds[path]) > SLOWEST * best:
                continue
            if problem.kept:
                computing.forward(x, neighbour, cells, geometry, path)
            seconds = elapsed(works[path], problem.device)
            if repeat:
                rounds[path].append(seconds)
    return {path.name: statistics.median(times) for path, times in rounds.items()}


def scale(times: list[dict[str, object]], beside: Path | None) -> list[dict[str, object]]:
    """Return the times with all of a pass lengthened or shortened so that one path takes what its units say."""
    if beside is None or beside.fitted is None:
        raise SystemExit("--beside: the name of a path that has been fitted")
    found, scaled = list(problems()), []
    for entry in times:
        known = {}
        for name, backward in (("forward", False), ("backward", True)):
            problem, seconds = found[entry["problem"]], entry[name]
            if beside.name in seconds:
                load = beside.load(problem._replace(backward=backward))
                factor = cpu_seconds(load, beside.fitted, backward=backward) / seconds[beside.name]
                known[name] = {path: factor * second for path, second in seconds.items()}
        scaled.append({"forward": {}, "backward": {}, **entry, **known})
    return scaled


def fit(times: list[dict[str, object]], found: Sequence[Problem]) -> None:
    """Print what is fitted and what it is worth."""
    word = "fitted" if found[0].on_cpu else "fitted_gpu"
    fitted: dict[str, Fitted] = {}
    for path in PATHS:
        units = []
        for name, backward in (("forward", False), ("backward", True)):
            entries = [entry for entry in times if path.name in entry[name]]
            if not entries:
                continue
            posed = [found[entry["problem"]]._replace(backward=backward) for entry in entries]
            rows = torch.tensor([amounts(path.load(problem)) for problem in posed], dtype=torch.float64)
            goal = torch.tensor([entry[name][path.name] for entry in entries], dtype=torch.float64)
            unit = least_squares(rows, goal)
            miss = (rows @ unit / goal - 1).abs()
            median, most = miss.median(), miss.quantile(0.9)
            print(f"{path.name:22} {name:8} misses {median:4.0%} in the median, {most:4.0%} in nine of ten")
            units.append(Units(*(float(f"{number:.2g}") for number in unit)))
        if units:
            fitted[path.name] = Fitted(units[0], units[-1])  # of one direction alone, the same for both
    for name, both in fitted.items():
        units = ", ".join("Units(" + ", ".join(f"{number:g}" for number in unit) + ")" for unit in both)
        print(f"{name:22} {word} = Fitted({units})")
    for name, backward in (("forward", False), ("backward", True)):
        ratios, chosen_seconds, least_seconds = [], 0.0, 0.0
        for entry in times:
            if not entry[name]:
                continue
            problem = found[entry["problem"]]._replace(backward=backward)
            chosen = min(
                (path for path in PATHS if path.name in entry[name]),
                key=lambda path: _seconds(path.load(problem), fitted[path.name], problem),
            )
            chosen_seconds += entry[name][chosen.name]
            least_seconds += min(entry[name].values())
            ratios.append((entry[name][chosen.name] / min(entry[name].values()), chosen.name, entry))
        print(f"{name}: all choices together take {chosen_seconds / least_seconds:.3f} × the fastest paths' time")
        slow = sorted(ratios, key=lambda ratio: ratio[0], reverse=True)
        print(f"{name}: {sum(r > 1.25 for r, *_ in ratios)} of {len(ratios)} choices over 1.25 × the fastest; worst:")
        for ratio, chosen, entry in slow[:8]:
            convolution, batch, size, cells, *_ = posed = found[entry["problem"]]
            problem = f"{list(convolution.kernel_shape)} of {cells} cells on {batch} × {list(size)}"
            print(f"    {ratio:.2f} × by {chosen} on {problem}{', kept' * posed.kept}: {entry[name]}")


def _seconds(load: Load, fitted: Fitted, problem: Problem) -> float:
    if problem.on_cpu:
        return cpu_seconds(load, fitted, backward=problem.backward)
    return gpu_seconds(load, fitted, problem.dtype, backward=problem.backward)


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
