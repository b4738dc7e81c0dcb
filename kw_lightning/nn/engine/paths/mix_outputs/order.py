"""What the paths of matrix products that mix outputs have in common."""

from __future__ import annotations

import math

from kw_lightning.nn.engine.paths.rows import Rows, RowSizes, RowsPath
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.workspace import sample_chunks


class MixOutputs(RowsPath):
    """A path that makes the outputs of every cell, [samples · input positions, cells, co], group by group."""

    def chunks(self, form: Rows) -> list[slice]:
        """Cut the batch so that the cells' outputs keep within the workspace."""
        x, _, cells, _ = form
        sample = len(cells) * math.prod(x.shape[1:-1]) * cells.shape[1] * x.element_size()
        return sample_chunks(len(x), sample, x.device)

    def count_convolved(self, problem: Problem, sizes: RowSizes) -> tuple[int, int]:
        """Return (numbers of the cells' outputs of one input group, chunks)."""
        sample = problem.cells * sizes.inputs * sizes.co
        chunks = sample_chunks(problem.batch, sample * problem.dtype.itemsize, problem.device)
        return problem.batch * sample, len(chunks)
