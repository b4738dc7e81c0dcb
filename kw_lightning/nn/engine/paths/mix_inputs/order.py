"""What the paths of matrix products that mix inputs have in common."""

from __future__ import annotations

import math

from kw_lightning.nn.engine.paths.rows import Rows, RowSizes, RowsPath
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.workspace import sample_chunks


class MixInputs(RowsPath):
    """A path that makes the mixed inputs of every cell, [samples · output positions, cells, ci], group by group."""

    def chunks(self, form: Rows) -> list[slice]:
        """Cut the batch so that the mixed inputs keep within the workspace."""
        x, _, cells, taps = form
        sample = len(cells) * math.prod(taps.output_size) * cells.shape[2] * x.element_size()
        return sample_chunks(len(x), sample, x.device)

    def count_mixed(self, problem: Problem, sizes: RowSizes) -> tuple[int, int]:
        """Return (numbers of the mixed inputs of one output group, chunks)."""
        sample = problem.cells * sizes.outputs * sizes.ci
        chunks = sample_chunks(problem.batch, sample * problem.dtype.itemsize, problem.device)
        return problem.batch * sample, len(chunks)
