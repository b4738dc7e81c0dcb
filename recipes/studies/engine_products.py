"""Compare the engine's compiled passes with torch's static convolutions, a layer at a time, on one thread.

    python recipes/studies/engine_products.py [--backward] [--last]

takes about two minutes. "ours" is the whole layer relative to the static one; "counted" its multiply-adds relative to
the static one's: backwards a kernel is mixed again, and its gradient folded into those of α and of the cells.
"products" is static over what ours takes beyond a map of one position, which is mixing and packing alone, so that 1 is
as fast as torch's static products. Times are of the thread's own processor time, so that other processes disturb them
little; both sides take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from kw_lightning.nn.engine import Convolution, computing
from kw_lightning.nn.engine.planner import rank
from kw_lightning.nn.engine.problem import Problem

# (name, in, out, kernel, map, stride, cell, cells, groups)
LAYERS = (
    ("resnet50 reduce 28²", 512, 128, 1, 28, 1, (128, 128), 104, 1),
    ("resnet50 expand 28²", 128, 512, 1, 28, 1, (128, 128), 104, 1),
    ("resnet50 expand 14²", 256, 1024, 1, 14, 1, (256, 256), 138, 1),
    ("resnet50 reduce 14²", 1024, 256, 1, 14, 1, (256, 256), 138, 1),
    ("resnet50 reduce 7²", 2048, 512, 1, 7, 1, (512, 512), 47, 1),
    ("mobilenetv2 expand 28²", 32, 192, 1, 28, 1, (32, 32), 40, 1),
    ("mobilenetv2 reduce 14²", 384, 96, 1, 14, 1, (96, 64), 60, 1),
    ("convnext, linear 14²", 384, 1536, 1, 14, 1, (384, 384), 72, 1),
    ("deit, linear 14²", 192, 768, 1, 14, 1, (192, 192), 40, 1),
    ("regnet 8 a group 14²", 208, 208, 3, 14, 1, (208, 8), 54, 26),
    ("regnet 16 a group 28²", 128, 128, 3, 28, 1, (128, 16), 27, 8),
    ("resnext 4 a group 56²", 128, 128, 3, 56, 1, (128, 4), 18, 32),
    ("resnext 16 a group 14²", 512, 512, 3, 14, 1, (512, 16), 54, 32),
    ("depthwise 3×3 112²", 32, 32, 3, 112, 1, (16, 1), 54, 32),
    ("depthwise 3×3 56² to 28²", 144, 144, 3, 56, 2, (48, 1), 54, 144),
    ("depthwise 3×3 14²", 384, 384, 3, 14, 1, (192, 1), 54, 384),
    ("depthwise 3×3 7²", 960, 960, 3, 7, 1, (320, 1), 54, 960),
    ("depthwise 5×5 28²", 240, 240, 5, 28, 1, (120, 1), 60, 240),
    ("depthwise 7×7 56²", 96, 96, 7, 56, 1, (96, 1), 147, 96),
    ("depthwise 7×7 7²", 768, 768, 7, 7, 1, (768, 1), 147, 768),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="Samples of a batch, one or several.")
    parser.add_argument("--backward", action="store_true", help="The gradients of input, attention and cells.")
    parser.add_argument("--last", action="store_true", help="Maps whose channels are last.")
    parser.add_argument("--repeats", type=int, default=7, help="Rounds; the medians are taken.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| layer | batch | static | ours | counted | products |\n| --- | --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        for layer in LAYERS:
            for batch in arguments.batch:
                options = {"backward": arguments.backward, "last": arguments.last}
                print(compare(layer, batch, arguments.repeats, **options), flush=True)


def compare(layer: tuple[Any, ...], batch: int, repeats: int, *, backward: bool = False, last: bool = False) -> str:
    """Return a row of the table."""
    name, inputs, outputs, kernel, side, stride, cell, cells, groups = layer
    geometry = Convolution(
        (outputs, inputs // groups, kernel, kernel), (*cell, 1, 1), (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
    )
    mixtures = math.prod(geometry.kernel_shape) // math.prod(cell)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, inputs, side, side).contiguous(memory_format=layout)
    weight = torch.randn(geometry.kernel_shape)
    attention, stored = torch.randn(batch, mixtures, cells), torch.randn(cells, *geometry.cell_shape)

    gradient = torch.randn_like(conv2d(x, weight, None, stride, kernel // 2, 1, groups))

    def ours(source: Tensor, outer: Tensor) -> Callable[[], object]:
        path = rank(Problem.of(x, attention, stored, geometry, backward=backward), "mix_kernels")[0]
        if not backward:
            return lambda: computing.forward(source, attention, stored, geometry, path)
        needed = [True] * 3
        return lambda: computing.backward(outer, source, attention, stored, geometry, path, needed, collected)

    def static_one() -> object:
        if not backward:
            return conv2d(x, weight, None, stride, kernel // 2, 1, groups)
        sides = [stride] * 2, [kernel // 2] * 2, [1] * 2
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *sides, False, [0, 0], groups, [True, True, False]
        )

    collected = torch.zeros_like(stored)
    work = [static_one, ours(x, gradient)]
    if kernel == 1:
        work.append(ours(*(tensor[..., :1, :1].contiguous(memory_format=layout) for tensor in (x, gradient))))
    static, dynamic, *mixing = times(work, repeats)
    counted = 1 + (1.5 if backward else 1) * cells / math.prod(geometry.output_size((side, side)))
    products = f"{static / (dynamic - mixing[0]):.2f}" if mixing else ""
    ratio = f"{dynamic / static:.2f} × | {counted:.2f} ×"
    return f"| {name} | {batch} | {static * 1e3:.2f} ms | {ratio} | {products} |"


def times(work: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each, which take turns."""
    rounds: list[list[float]] = []
    for _ in range(repeats + 1):
        seconds = []
        for call in work:
            start = time.thread_time()
            call()
            seconds.append(time.thread_time() - start)
        rounds.append(seconds)
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]


if __name__ == "__main__":
    main()
