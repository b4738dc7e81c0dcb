"""Mix inputs in the cache, a cell at a time, which is read as it lies."""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved, padded_cell
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import find_taps


class InputsCompiled(CompiledPath):
    """The passes of native/mix_inputs.c."""

    name = "mix_inputs/compiled"
    # Fitted to 11 problems of maps of 6² to 1², beside two paths whose units stood still.
    fitted = Fitted(Units(1.9e-10, 2.5e-11, 3.8e-11, 0, 0.0031), Units(4.7e-10, 6.3e-11, 0, 0, 0.0043))
    form = native.MIX_INPUTS

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        convolution = problem.convolution
        _, out_groups, in_groups = convolution.grid
        taps = find_taps(convolution, problem.size)
        rows = problem.batch * out_groups * math.prod(taps.output_size) * problem.cells
        mixing = rows * convolution.cell_shape[1] * in_groups * len(taps.taps)
        return Load(mixing, rows * padded_cell(convolution), moved(problem), 0)
