"""Time what layers save by doing in evaluation what comes after them, beside static networks.

    python recipes/studies/epilogues.py resnet18-kw-1x mobilenetv2-050-kw-1x --batch 1 8 --size 96 224

takes some minutes. Four forms of a network take turns in one process: with and without epilogues, and its static twin
as it is and with its norms folded into its weights. Ratios are medians over the rounds of each round's; with --cpu of
the processor's time instead of the clock's, on a machine that does other things besides.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kw_lightning.bench import describe_machine
from kw_lightning.builder import build, make_static
from kw_lightning.export.norms import fold_norms
from kw_lightning.nn import set_temperature
from kw_lightning.nn.finishing import epilogues
from kw_lightning.recipe import load_recipe

PAIRS = (("with", "without"), ("without", "static"), ("with", "static"), ("with", "static folded"))
HEAD = ("network", "static", "with", "without", *(f"{one} / {other}" for one, other in PAIRS))


def main() -> None:
    """Print a line of Markdown for each network, batch and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu else time.perf_counter
    print(f"{describe_machine(torch.device('cpu'), torch.float32)}, {torch.get_num_threads()} threads\n")
    print(f"| {' | '.join(HEAD)} |\n| --- {'| ---: ' * (len(HEAD) - 1)}|")
    for name in options.recipes:
        forms = Forms(name)
        for size, batch in itertools.product(options.size, options.batch):
            with torch.inference_mode():
                times = forms.times(torch.randn(batch, 3, size, size), options.repeats, clock)
            print(f"| {name}, batch {batch}, {size}² | {' | '.join(row(times))} |", flush=True)


class Forms:
    """The four forms of a network, at temperature 0; weights are random."""

    def __init__(self, recipe: str) -> None:
        loaded = load_recipe(recipe)
        self.ours, self.static = build(loaded, pretrained=False).eval(), make_static(loaded).eval()
        self.folded, _ = fold_norms(self.static)
        set_temperature(self.ours, 0.0)

    def times(self, x: Tensor, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
        """Return the seconds of every form; one round before the first is not counted."""
        found: dict[str, list[float]] = {}
        for turn in range(repeats + 1):
            for form, seconds in self._round(x, clock):
                found.setdefault(form, []).append(seconds)
            if not turn:
                found.clear()
        return found

    def _round(self, x: Tensor, clock: Callable[[], float]) -> Iterator[tuple[str, float]]:
        for form, network in (("static", self.static), ("static folded", self.folded), ("without", self.ours)):
            yield form, elapsed(network, x, clock)
        with epilogues(self.ours):
            yield "with", elapsed(self.ours, x, clock)


def elapsed(network: nn.Module, x: Tensor, clock: Callable[[], float]) -> float:
    """Return the seconds of the second of two passes, whose network the first has brought into the caches."""
    network(x)
    begin = clock()
    network(x)
    return clock() - begin


def row(times: dict[str, list[float]]) -> Iterator[str]:
    """Return milliseconds and ratios, as the head names them."""
    for form in ("static", "with", "without"):
        yield f"{1000 * statistics.median(times[form]):.1f} ms"
    for one, other in PAIRS:
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        yield f"{statistics.median(ratios):.2f} ×"


if __name__ == "__main__":
    main()
