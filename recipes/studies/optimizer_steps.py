"""What a step of an optimizer takes: parameter by parameter, in lists of them, and by one kernel for all.

    python recipes/studies/optimizer_steps.py resnet18-kw-4x

prints the median milliseconds of a step of a recipe's network on the CPU, each way by turns with the others.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from kw_lightning.bench import describe_machine
from kw_lightning.builder import apply_plan, make_static
from kw_lightning.nn.clock import elapsed
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe

CPU = torch.device("cpu")
WAYS = {"parameter by parameter": {"foreach": False}, "in lists": {"foreach": True}, "by one kernel": {"fused": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="Name or file of a recipe.")
    parser.add_argument("--repeats", type=int, default=9, help="Steps; the medians are taken.")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    network = apply_plan(plan(recipe, input_shape=(3, 224, 224)), make_static(recipe)).model
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(describe_machine(CPU, torch.float32))
    for name, further in (("AdamW", {}), ("SGD", {"momentum": 0.9})):
        optimizers = {
            way: getattr(torch.optim, name)(network.parameters(), lr=1e-5, **further, **options)
            for way, options in WAYS.items()
        }
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats + 1):
            for way, optimizer in optimizers.items():
                seconds = elapsed(optimizer.step, CPU)
                if repeat:
                    found[way].append(1e3 * seconds)
        times = ", ".join(f"{way} {statistics.median(seconds):.1f} ms" for way, seconds in found.items())
        print(f"{arguments.recipe}, {count:,} parameters, {name}: {times}")


if __name__ == "__main__":
    main()
