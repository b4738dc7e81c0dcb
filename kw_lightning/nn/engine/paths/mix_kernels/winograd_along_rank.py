"""Mix kernels of few bases as `along_rank` does, and use them in Winograd's form as `winograd` does."""

from __future__ import annotations

import dataclasses

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units
from kw_lightning.nn.engine.paths.compiled import CompiledPath, moved
from kw_lightning.nn.engine.paths.mix_kernels.along_rank import AlongRank
from kw_lightning.nn.engine.paths.mix_kernels.winograd import TRANSFORMING, Winograd
from kw_lightning.nn.engine.problem import Problem


class WinogradAlongRank(AlongRank):
    """The pass of native/mix_kernels.c with bases, between transformed maps."""

    name = "mix_kernels/winograd_along_rank"
    # Of kept bases, so forward; fitted as those of `AlongRank`, to 41 problems.
    fitted = Fitted(*[Units(6.5e-11, 4.5e-11, 8e-10, 0, 0.0015)] * 2)
    form = native.WINOGRAD_BASES

    def refusal(self, problem: Problem) -> str | None:
        """Return why it cannot compute a problem, None where it can."""
        return super().refusal(problem) or CompiledPath.refusal(self, problem)

    def refuses(self, convolution: Convolution) -> str | None:
        """Return why it cannot compute a geometry, None where it can."""
        return Winograd().refuses(convolution)

    def unsuited(self, problem: Problem) -> str | None:
        """Return why it is never the fastest at a problem, None where it may be."""
        if not problem.kept:
            return "where bases are not kept, its larger maps make it mix them more often"
        return super().unsuited(problem)

    def load(self, problem: Problem) -> Load:
        """Count the work of a forward pass: the mixing of `AlongRank`, transforms and products of `Winograd`."""
        along, transformed = super().load(problem), Winograd().load(problem)
        return dataclasses.replace(
            along,
            mixing=along.mixing + transformed.mixing * TRANSFORMING / (problem.cells + TRANSFORMING),
            products=transformed.products,
            elements=along.elements - moved(problem) + transformed.elements,
        )
