"""Mix kernels as `compiled` does, in Winograd's form F(2, 3), which takes fewer products on a tile of the output.

A sample's kernel is transformed when it has been mixed, in the cache. See native/positions.py.
"""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.paths.compiled import CompiledPath, dense_refusal, moved, padded_cell, spared
from kw_lightning.nn.engine.problem import Problem

# Cells that are mixed in the time in which a kernel is transformed.
TRANSFORMING = 8


class Winograd(CompiledPath):
    """The pass of native/mix_kernels.c between transformed maps."""

    name = "mix_kernels/winograd"
    # Fitted beside `KernelsCompiled`, whose units stood still: 81 problems with AVX-512, one thread.
    fitted = Fitted(Units(4.3e-11, 4.3e-11, 3.7e-10, 0, 0.00023), Units(1.3e-10, 7.5e-11, 1e-09, 0, 0.00035))
    form = native.WINOGRAD

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can."""
        reason = dense_refusal(convolution)
        if reason is None and not native.allows_winograd(convolution):
            return "it is for three kernel positions a dimension, without stride or dilation"
        return reason

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass: four transformed positions a dimension for a tile of two outputs."""
        convolution = problem.convolution
        _, out_groups, in_groups = convolution.grid
        positions, taps = 3**convolution.dimensions, 4**convolution.dimensions
        tiles = math.prod(-(-n // 2) for n in convolution.output_size(problem.size))
        kernels = problem.batch * out_groups * in_groups * padded_cell(convolution)
        packed = problem.cells * padded_cell(convolution)
        maps = (moved(problem) - packed) * taps / 2**convolution.dimensions
        elements = maps + packed - spared(problem, positions)
        return Load(kernels * positions * (problem.cells + TRANSFORMING), kernels * taps * tiles, elements, 0)
