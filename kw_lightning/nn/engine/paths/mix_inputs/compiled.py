"""Mix inputs in the cache, one cell at a time, without packing it."""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.costs import Fitted, Load, Units, narrow
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved, padded_cell
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import find_taps


class InputsCompiled(CompiledPath):
    """The passes of native/mix_inputs.c."""

    name = "mix_inputs/compiled"
    # Fitted with `OutputsByCell` beside `KernelsCompiled`, whose units stood still: forward to 125 problems, of single
    # samples with hundreds of large cells too, with AVX2 and AVX-512; backward to 68 of maps of 8² to 1².
    fitted = Fitted(Units(2.1e-10, 2.7e-11, 3.7e-10, 0, 0.00048), Units(5.6e-10, 4.7e-11, 0, 0, 0.00042))
    form = native.MIX_INPUTS

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass; where cells have few input channels, so have all its products."""
        convolution = problem.convolution
        _, out_groups, in_groups = convolution.grid
        taps = find_taps(convolution, problem.size)
        rows = problem.batch * out_groups * math.prod(taps.output_size) * problem.cells
        mixing = rows * convolution.cell_shape[1] * in_groups * len(taps.taps)
        slower = narrow(convolution.cell_shape[1])
        return Load(mixing, rows * padded_cell(convolution), moved(problem), 0, (slower, slower))
