"""Mix the kernels of a depthwise convolution in the cache, channels side by side in the vectors."""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Load
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved, padded_cell
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import find_taps


class Depthwise(CompiledPath):
    """The pass of native/mix_depthwise.c."""

    name = "mix_kernels/depthwise"
    form = native.DEPTHWISE

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can; of one channel, every path can compute one."""
        channels, inputs = convolution.kernel_shape[:2]
        if not channels == convolution.groups > 1 == inputs:
            return "it is for convolutions of every channel by itself"
        return None if math.prod(convolution.cell_shape[2:]) == 1 else "it takes cells of one kernel position"

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass: lines of nothing but padding are left out, padding beside a line is not."""
        _, out_groups, _ = problem.convolution.grid
        found = find_taps(problem.convolution, problem.size)
        taps, line = found.taps, found.output_size[-1]
        read = sum(math.prod(place.stop - place.start for place in tap.target[:-1]) * line for tap in taps)
        kernels = problem.batch * out_groups * padded_cell(problem.convolution)  # of one tap
        return Load(kernels * len(taps) * problem.cells, kernels * read, moved(problem), 0)
