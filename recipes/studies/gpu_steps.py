"""What steps of networks on a GPU wait for: the CPU that starts their operators, or the GPU.

    python recipes/studies/gpu_steps.py resnet18-kw-1x mobilenetv2-100-kw-1x --batch 256

prints, of the static network and with warehouses, in bfloat16 by autocast and channels last, a step's time, the time
until the CPU has started it, the time that the GPU computes, the operators that it is made of, and the time of the same
step captured as one CUDA graph, which waits for no CPU: medians of some steps, one network after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kw_lightning.bench import describe_machine
from kw_lightning.builder import apply_plan, make_static
from kw_lightning.nn import set_temperature
from kw_lightning.nn.clock import captured, elapsed
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

GPU = torch.device("cuda")
WARM_UP = 3


class Step(NamedTuple):
    """What one step takes, in milliseconds.

    Attributes:
        whole: until the GPU is done.
        started: until the CPU is.
        busy: of the GPU's operators, added up.
        operators: that the GPU computes.
        captured: the same as one CUDA graph.
    """

    whole: float
    started: float
    busy: float
    operators: int
    captured: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="Names or files of recipes.")
    parser.add_argument("--batch", type=int, default=256, help="Samples.")
    parser.add_argument("--size", type=int, default=224, help="Height and width.")
    parser.add_argument("--repeats", type=int, default=5, help="Steps; the medians are taken.")
    arguments = parser.parse_args()
    print(describe_machine(GPU, torch.bfloat16))
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=GPU)
    x = x.contiguous(memory_format=torch.channels_last)
    for name in arguments.recipes:
        recipe = load_recipe(name)
        dynamic = apply_plan(plan(recipe, input_shape=tuple(x.shape[1:])), make_static(recipe)).model
        set_temperature(dynamic, 0.0)
        for kind, network in (("static", make_static(recipe)), ("with warehouses", dynamic)):
            network.to(GPU).to(memory_format=torch.channels_last)
            for mode in ("training", "inference"):
                network.train(mode == "training")
                found = measure((train if mode == "training" else infer)(network, x), arguments.repeats)
                print(
                    f"{name}, {kind}, {mode}: {found.whole:.2f} ms, started in {found.started:.2f}, GPU busy "
                    f"{found.busy:.2f} with {found.operators} operators, captured {found.captured:.2f}",
                    flush=True,
                )


def train(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward and a backward pass."""

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            y = network(x)
        y.float().square().mean().backward()

    return step


def infer(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward pass in inference mode."""

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            y: Tensor = network(x)
        return y

    return step


def measure(step: Callable[[], object], repeats: int) -> Step:
    """Return what a step takes."""
    for _ in range(WARM_UP):
        step()
    whole, started = zip(*(_timed(step) for _ in range(repeats)), strict=True)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        elapsed(step, GPU)
    operators = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    replay = captured(step)
    elapsed(replay, GPU)
    replays = [elapsed(replay, GPU) for _ in range(repeats)]
    of_whole, of_started, of_replays = (1e3 * statistics.median(times) for times in (whole, started, replays))
    busy = sum(event.device_time for event in operators) / 1e3
    return Step(of_whole, of_started, busy, len(operators), of_replays)


def _timed(step: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds until the GPU is done, and until the CPU is."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    started = time.perf_counter() - begin
    torch.cuda.synchronize()
    return time.perf_counter() - begin, started


if __name__ == "__main__":
    main()
