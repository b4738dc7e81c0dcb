"""Mix kernels as `compiled` does, but from few bases, mixed from the cells once for all samples: see ranks.py."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from kw_lightning.nn.engine import kept, native, ranks
from kw_lightning.nn.engine.costs import Fitted, Load, Units, narrow
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.layouts import first_or_last
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved, padded_cell
from kw_lightning.nn.engine.paths.mix_kernels.compiled import KernelsCompiled
from kw_lightning.nn.engine.problem import Operands, Problem

# Layers that share the cells, of which one reads them to check whether kept bases are still valid: see contents.py.
READERS = 4
# Bytes of maps for which bases are mixed once, see native/blocking.py.
MAPS_BYTES = 32 * 2**20


def _mixtures(problem: Problem) -> int:
    spatial, out_groups, in_groups = problem.convolution.grid
    return math.prod(spatial) * out_groups * in_groups


class AlongRank(CompiledPath):
    """The pass of native/mix_kernels.c with bases; elsewhere PyTorch's products, to test it against."""

    name = "mix_kernels/along_rank"
    # Fitted beside `KernelsCompiled`, whose units stood still: 229 problems with and without kept bases, with AVX2 and
    # AVX-512, and 75 backward.
    fitted = Fitted(Units(3.6e-11, 3.2e-11, 6.3e-10, 0, 0.0015), Units(9.7e-11, 8.7e-11, 1.4e-09, 0, 0.0012))
    form = native.MIX_BASES
    of_bases = True

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can."""
        return None if problem.width is not None else "the factors of the attention are not at hand"

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        return super().refusal(problem)

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass, as `KernelsCompiled.load` does; bases are mixed once for all samples.

        Bases that may be kept count as kept already, and are loaded in place of the cells. With the bases of many
        mixtures a block has few depths, so its products are short.
        """
        plain, count = KernelsCompiled().load(problem), ranks.count(problem.width or 0)
        kernel = plain.mixing / max(problem.batch * problem.cells, 1)  # numbers of a sample's
        bases = kernel * count
        (spatial, *groups), side = problem.convolution.grid, 0 if problem.backward else 1
        depths = native.depths_of_bases(_mixtures(problem) * count, problem.convolution.cell_shape[side])
        slower = 1.0, narrow(depths * groups[side] * math.prod(spatial))
        if problem.kept:
            elements = moved(problem) - problem.cells * padded_cell(problem.convolution) * (1 - 1 / READERS) + bases
            return Load(bases * problem.batch, plain.products, elements, 0, slower)
        maps = 4 * problem.batch * problem.convolution.kernel_shape[1] * math.prod(problem.size)
        once = problem.cells * math.ceil(max(maps, 1) / MAPS_BYTES)
        return Load(bases * (problem.batch + once), plain.products, moved(problem), 0, slower)

    def forward(self, operands: Operands, y: Tensor) -> None:
        """Write the convolution of every sample with its own kernel."""
        x, weights, cells, convolution, ranked, _ = operands
        assert ranked is not None
        if self._is_compiled(operands):
            self._forward(operands, y)
        else:
            ranks.forward(x, weights, ranked.bases.to(x.dtype), cells, convolution, y)

    def forward_finished(self, operands: Operands, y: Tensor, epilogue: Epilogue) -> Tensor:
        """Return the convolution after the epilogue, which the pass applies as it writes."""
        if self._is_compiled(operands) and epilogue.fits(y):
            self._forward(operands, y, epilogue)
            return y
        self.forward(operands, y)
        return epilogue.apply(y)

    def backward(self, gradient: Tensor, operands: Operands, needed: tuple[bool, bool, bool]) -> Gradients:
        """Return the gradients."""
        _, weights, cells, convolution, ranked, _ = operands
        assert ranked is not None
        x, bases = first_or_last(operands.x), ranked.bases.to(operands.x.dtype).contiguous()
        compiled = self._is_compiled(operands)
        found = new_gradients(x, weights, cells, needed, operands.collected if compiled else None)
        if compiled:
            of_bases = native.backward_by_bases(
                first_or_last(gradient), x, weights, bases, cells, convolution, found, self.form
            )
        else:
            of_bases = ranks.backward(gradient, x, weights, bases, cells, convolution, found)
        return dataclasses.replace(found, bases=of_bases)

    def _forward(self, operands: Operands, y: Tensor, epilogue: Epilogue | None = None) -> None:
        x, weights, cells, convolution, ranked, _ = operands
        assert ranked is not None
        geometry = convolution, native.live(convolution, tuple(x.shape[2:]), self.form)
        blocks = kept.keep(ranked.factors, cells, geometry) if kept.may_keep(ranked.factors, cells) else None
        bases = ranked.bases.to(x.dtype).contiguous()
        native.forward_by_bases(first_or_last(x), weights, bases, cells, convolution, y, self.form, blocks, epilogue)

    def _is_compiled(self, operands: Operands) -> bool:
        x, weights, cells, convolution, *_ = operands
        width = weights.shape[2]
        problem = Problem(convolution, len(x), tuple(x.shape[2:]), len(cells), x.dtype, x.device, width=width)
        return super().refusal(problem) is None
