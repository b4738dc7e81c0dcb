"""Mix the kernels of a grouped convolution in the cache: each group is a small dense convolution by itself."""

from __future__ import annotations

import math

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Load
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved, padded_cell
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import find_taps


class ByGroup(CompiledPath):
    """The pass of native/mix_kernels.c, group by group."""

    name = "mix_kernels/by_group"
    form = native.MIX_KERNELS

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can."""
        if not 1 < convolution.groups < convolution.kernel_shape[0]:
            return "it is for convolutions in groups of several channels"
        if math.prod(convolution.cell_shape[2:]) > 1:
            return "it takes cells of one kernel position"
        channels, cell = convolution.kernel_shape[0] // convolution.groups, convolution.cell_shape[0]
        return (
            None if channels % cell == 0 or cell % channels == 0 else "it takes cells of whole groups or parts of one"
        )

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        convolution = problem.convolution
        _, out_groups, in_groups = convolution.grid
        spanned = max(convolution.cell_shape[0] * convolution.groups // convolution.kernel_shape[0], 1)
        taps = find_taps(convolution, problem.size).taps
        read = sum(math.prod(place.stop - place.start for place in tap.target) for tap in taps)
        kernels = problem.batch * out_groups * in_groups * padded_cell(convolution, spanned)  # of one tap
        return Load(kernels * len(taps) * problem.cells, kernels * read, moved(problem), 0)
