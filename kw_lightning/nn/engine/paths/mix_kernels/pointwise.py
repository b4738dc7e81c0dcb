"""Mix the kernels of a 1×1 convolution and use them, in the memory layouts of its cells and maps."""

from __future__ import annotations

import math

from torch import Tensor

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.layouts import channels_last
from kw_lightning.nn.engine.paths.compiled import CompiledPath, backward_form, dense_refusal, suits_rows
from kw_lightning.nn.engine.problem import Problem

# Numbers of cells that exceed the second-level cache: from then on packing them for few samples is most of the work.
FAR_NUMBERS = 2**18
# Positions in a vector.
POSITIONS = 8


class Pointwise(CompiledPath):
    """The pass of native/mix_lines.c for maps whose channels come first, that of native/mix_rows.c for the others."""

    name = "mix_kernels/pointwise"
    # Forward fitted beside `KernelsCompiled`, whose units stood still, on 48 problems.
    fitted = Fitted(Units(3.8e-11, 3.3e-11, 2.4e-10, 0, 0.00026), Units(1e-10, 6.9e-11, 1.6e-09, 0, 0.00042))
    form = native.MIX_LINES

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can."""
        reason = dense_refusal(convolution)
        if reason is None and math.prod(convolution.kernel_shape[2:]) > 1:
            return "it is for kernels of one position"
        return reason

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest for a problem, None where it may be."""
        if problem.backward:
            return "its backward pass is that of mix_kernels/compiled"
        convolution = problem.convolution
        far = problem.cells * math.prod(convolution.cell_shape) >= FAR_NUMBERS
        if far and native.mixes_few(problem.batch * convolution.grid[1] * convolution.grid[2], problem.cells):
            return "it packs the cells, which takes longer than it saves for so few kernels"
        return None

    def form_of(self, x: Tensor, cells: Tensor, convolution: Convolution, *, backward: bool = False) -> native.Form:
        """Return the pass for the memory layout of an input [batch, in_channels, *size]."""
        if backward:
            return backward_form(x, cells, convolution)
        if suits_rows(x, cells, convolution, backward=False):
            return native.MIX_ROWS
        return native.MIX_KERNELS if channels_last(x) else self.form

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass."""
        convolution = problem.convolution
        kernel, outputs = math.prod(convolution.kernel_shape), math.prod(convolution.output_size(problem.size))
        maps = convolution.kernel_shape[0] * outputs + convolution.kernel_shape[1] * math.prod(problem.size)
        elements = problem.batch * maps + problem.cells * math.prod(convolution.cell_shape)
        products = problem.batch * kernel * -(-outputs // POSITIONS) * POSITIONS
        return Load(problem.batch * kernel * problem.cells, products, elements, 0)
