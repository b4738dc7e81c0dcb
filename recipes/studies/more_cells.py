"""Time of a shipped network at a large budget over the same network at budget 1: what more cells cost.

    python recipes/studies/more_cells.py resnet50 --batch 32 --size 96
    python recipes/studies/more_cells.py resnet18 --batch 128 --size 64 --train --beside ../another-checkout

Both networks, and with `--beside` both again by the package of another checkout, are timed in turns, in a process for
each package, so that a busy machine is busy for all of them; the ratio of the medians is what is worth keeping.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def serve(options: argparse.Namespace) -> None:
    """Do a pass by either network for every line of the input, `1` or the large budget, and print its seconds."""
    import torch

    from kw_lightning.builder import build
    from kw_lightning.nn import set_temperature
    from kw_lightning.nn.clock import elapsed
    from kw_lightning.recipe import load_recipe

    torch.manual_seed(0)
    networks = {}
    for budget in ("1", options.budget):
        network = build(load_recipe(f"{options.network}-kw-{budget}x"), pretrained=False)
        set_temperature(network, 0.0)
        networks[budget] = network.to(memory_format=torch.channels_last).train(options.train)
    x = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)

    def work(network: torch.nn.Module) -> None:
        if options.train:
            network.zero_grad()
            network(x).square().mean().backward()
            return
        with torch.inference_mode():
            network(x)

    for line in sys.stdin:
        network = networks[line.strip()]
        print(elapsed(lambda network=network: work(network), x.device), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="as resnet18: there are recipes NETWORK-kw-1x and NETWORK-kw-4x")
    parser.add_argument("--budget", default="4", help="of the recipe with more cells")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=96, help="side of the images")
    parser.add_argument("--train", action="store_true", help="a forward and a backward pass instead of inference")
    parser.add_argument("--rounds", type=int, default=5, help="the medians are taken")
    parser.add_argument("--beside", type=Path, help="another checkout of this package, timed in the same turns")
    parser.add_argument("--output", type=Path, help="a JSON file for the seconds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    packages = {"this": ROOT} | ({} if options.beside is None else {"beside": options.beside.resolve()})
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--serve"]
    servers = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        for name, root in packages.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"1": [], options.budget: []} for name in packages}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, server in servers.items():
            assert server.stdin is not None
            assert server.stdout is not None
            for budget, times in seconds[name].items():
                print(budget, file=server.stdin, flush=True)
                line = server.stdout.readline()
                if not line:
                    raise SystemExit(f"{packages[name]} ended early, with exit code {server.wait()}")
                if turn:
                    times.append(float(line))
    for server in servers.values():
        server.communicate()
    mode = "training" if options.train else "inference"
    for name, found in seconds.items():
        few, many = (statistics.median(found[budget]) for budget in ("1", options.budget))
        what = f"{options.network}, {mode}, {options.batch} × {options.size}²"
        print(f"{what}, {packages[name].name}: {options.budget}× takes {many / few:.2f} times as long as 1×")
    if options.output is not None:
        options.output.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
