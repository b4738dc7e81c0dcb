"""Mix kernels as `compiled` does, in Winograd's form F(2, 3), which takes fewer products on a tile of the output.

The mixture, being linear, may be of transformed kernels: α comes transformed. See native/positions.py.
"""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.paths.compiled import CompiledPath, dense_refusal, moved, padded_cell
from kw_lightning.nn.engine.problem import Problem


class Winograd(CompiledPath):
    """The pass of native/mix_kernels.c between transformed maps."""

    name = "mix_kernels/winograd"
    fitted = Fitted(Units(3.6e-11, 5.2e-11, 4e-10, 0, 0.00061), Units(1.1e-10, 8e-11, 1.7e-09, 0, 0))
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
        taps = 4**convolution.dimensions
        tiles = math.prod(-(-n // 2) for n in convolution.output_size(problem.size))
        kernels = problem.batch * out_groups * in_groups * padded_cell(convolution) * taps
        packed = problem.cells * padded_cell(convolution)
        elements = (moved(problem) - packed) * taps / 2**convolution.dimensions + packed
        return Load(kernels * problem.cells, kernels * tiles, elements, 0)
