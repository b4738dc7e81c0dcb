"""Mix kernels block by block in the cache and use them there: no sample's whole kernel ever exists."""

from __future__ import annotations

import math

from torch import Tensor

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.paths.compiled import CompiledPath, backward_form, moved, padded_cell, spared
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.taps import find_taps


class KernelsCompiled(CompiledPath):
    """The pass of native/mix_kernels.c."""

    name = "mix_kernels/compiled"
    fitted = Fitted(Units(3.4e-11, 3.7e-11, 5.6e-10, 0, 0.00024), Units(1e-10, 6.9e-11, 1.6e-09, 0, 0.00042))
    form = native.MIX_KERNELS

    def form_of(self, x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool = False) -> native.Form:
        """Return the pass for an input: backward those of `Pointwise`, where they are faster."""
        return backward_form(x, cells, convolution) if backward else self.form

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass: no product is taken with the padding."""
        _, out_groups, in_groups = problem.convolution.grid
        taps = find_taps(problem.convolution, problem.size).taps
        read = sum(math.prod(place.stop - place.start for place in tap.target) for tap in taps)
        kernels = problem.batch * out_groups * in_groups * padded_cell(problem.convolution)  # of one tap
        return Load(kernels * len(taps) * problem.cells, kernels * read, moved(problem) - spared(problem, len(taps)), 0)
