"""Mixing along the attention's rank: kernels of a mixture's own bases, as many as the hidden layer is wide.

A mixture's α of any sample is share · (V·h + c) + τ·β, so its block of the kernel is a mixture of the bases
B_k = Σ_j V_jk·E_j, of C = Σ_j c_j·E_j and of the cell that it starts as: exact, whatever the number of cells. The bases
are made once for a batch; then a sample costs the width of the hidden layer, and not the number of cells.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.costs import Fitted, Load, Units, cpu_seconds
from kw_lightning.nn.engine.epilogue import Epilogue
from kw_lightning.nn.engine.factors import AttentionFactors, FactorGradients, differentiate_sizes, make_sizes
from kw_lightning.nn.engine.gradients import Gradients, new_gradients
from kw_lightning.nn.engine.kept import use
from kw_lightning.nn.engine.layouts import first_or_last
from kw_lightning.nn.engine.native import Kept
from kw_lightning.nn.engine.paths.compiled import dense_refusal
from kw_lightning.nn.engine.paths.mix_kernels.compiled import KernelsCompiled
from kw_lightning.nn.engine.planner import survey
from kw_lightning.nn.engine.problem import Problem
from kw_lightning.nn.engine.reference import join_mixtures, split_kernels
from kw_lightning.nn.engine.workspace import sample_chunks

# As of `KernelsCompiled`; mixing has fewer terms and its own bases for each mixture, which take 1.6 times as long
# forward and 1.25 times backward: ResNet18 4×, maps of 16² to 4², batch 128.
FITTED = Fitted(Units(5.5e-11, 3.7e-11, 5.6e-10, 0, 0.0003), Units(1.25e-10, 6.9e-11, 1.6e-09, 0, 0.0006))
# How much faster it has to promise to be.
MARGIN = 1.1
# Samples whose mixing takes as long as bringing kept bases from the memory.
STREAMING = 3
# Bytes of maps for which bases are mixed once, see native/passes.py.
MAPS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Ranked:
    """Factors as a mixture of bases.

    Attributes:
        factors: the attention's.
        sizes: Σ|z| + 1e-3, [batch, mixtures].
        weights: of the bases, [batch, mixtures, ranks]: the constant's, the hidden activations', and β's where τ > 0.
        bases: by cells, [mixtures, ranks, cells].
    """

    factors: AttentionFactors
    sizes: Tensor
    weights: Tensor
    bases: Tensor

    @property
    def share(self) -> Tensor:
        """Return (1 − τ) / s, [batch, mixtures, 1]."""
        return ((1 - self.factors.temperature) / self.sizes).unsqueeze(-1)


def rank(factors: AttentionFactors) -> Ranked:
    """Return factors as a mixture of bases."""
    hidden, mixtures = factors.hidden, factors.mixtures
    sizes = make_sizes(factors)
    share = ((1 - factors.temperature) / sizes).unsqueeze(-1)
    constant = hidden.new_ones(len(hidden), 1)
    weights = torch.cat([constant, hidden], 1).unsqueeze(1) * share
    columns = factors.weight.view(mixtures, -1, hidden.shape[1])[:, :-1]
    constants = factors.bias.view(mixtures, 1, -1)[..., :-1]
    bases = torch.cat([constants, columns.mT], 1)
    if float(factors.temperature) > 0:  # else the start is no part of the mixture
        begin = factors.begin(bases.shape[-1])
        weights = torch.cat([weights, weights.new_ones(*weights.shape[:2], 1)], 2)
        bases = torch.cat([bases, begin.unsqueeze(1)], 1)
    return Ranked(factors, sizes, weights, bases)


def differentiate(ranked: Ranked, of_weights: Tensor, of_bases: Tensor) -> FactorGradients:
    """Return the gradients of the factors from those of weights and bases; β's take none."""
    factors, share = ranked.factors, ranked.share
    width = factors.hidden.shape[1] + 1
    of_weights, of_bases = of_weights[..., :width], of_bases[:, :width]
    of_share = of_weights[..., 0] + torch.einsum("bmk,bk->bm", of_weights[..., 1:], factors.hidden)
    found = differentiate_sizes(factors, of_share * share.squeeze(-1) / -ranked.sizes)
    found.hidden.add_(torch.einsum("bmk,bm->bk", of_weights[..., 1:], share.squeeze(-1)))
    found.bias.view(factors.mixtures, -1)[:, :-1].add_(of_bases[:, 0])
    found.weight.view(factors.mixtures, -1, width - 1)[:, :-1].add_(of_bases[:, 1:].mT)
    return found


def pays(problem: Problem, engine: str, width: int, *, kept: bool) -> bool:
    """Return whether to mix along the rank: as it is told by `kept.bases`, else where it should be faster.

    Args:
        problem: what is to be computed.
        engine: one of `planner.ENGINES`, **or** the name of a path, which then is taken.
        width: of the attention's hidden layer.
        kept: the bases are there already.
    """
    if use() == "never" or engine not in ("auto", "autotune", "mix_kernels"):
        return False
    return use() == "always" or _is_faster(problem, engine, width, kept)


@functools.lru_cache(maxsize=4096)
def _is_faster(problem: Problem, engine: str, width: int, kept: bool) -> bool:
    single = problem.dtype == torch.float32 and problem.on_cpu
    if not single or dense_refusal(problem.convolution) is not None or not native.available():
        return False
    others = [choice.seconds for choice in survey(problem, engine) if choice.seconds is not None]
    found = cpu_seconds(load(problem, width, kept=kept), FITTED, backward=problem.backward)
    return bool(others) and found * MARGIN < min(others)


def load(problem: Problem, width: int, *, kept: bool) -> Load:
    """Count the work of a forward pass, as `KernelsCompiled.load` does: bases are mixed once for all maps at once.

    Args:
        problem: what is to be computed, without groups.
        width: of the attention's hidden layer.
        kept: the bases are there already, and streamed from the memory.
    """
    plain = KernelsCompiled().load(problem)
    kernels = plain.mixing / (problem.batch * problem.cells) if problem.batch * problem.cells else 0.0
    ranks = width + 1
    maps = 4 * problem.batch * problem.convolution.kernel_shape[1] * math.prod(problem.size)
    once = STREAMING if kept else problem.cells * math.ceil(max(maps, 1) / MAPS_BYTES)
    return dataclasses.replace(plain, mixing=kernels * ranks * (problem.batch + once))


def size_of_bases(factors: AttentionFactors, cells: Tensor) -> int:
    """Return the bytes of the mixed bases, but for what their blocks are padded by."""
    return 4 * factors.mixtures * (factors.hidden.shape[1] + 2) * math.prod(cells.shape[1:])


def is_compiled(x: Tensor, convolution: Convolution) -> bool:
    """Return whether the compiled pass serves."""
    single = x.dtype == torch.float32 and x.device.type == "cpu"
    return single and dense_refusal(convolution) is None and native.available()


def forward(
    x: Tensor,
    ranked: Ranked,
    cells: Tensor,
    convolution: Convolution,
    y: Tensor,
    kept: Kept | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Return the convolution of every sample with its own kernel.

    Args:
        x: [batch, in_channels, *size], not empty.
        ranked: the attention.
        cells: E [cells, co, ci, *ck].
        y: [batch, out_channels, *output_size], overwritten.
        kept: see `native.forward_by_bases`.
        epilogue: what becomes of the output.
    """
    weights, bases = ranked.weights.to(x.dtype).contiguous(), ranked.bases.to(x.dtype).contiguous()
    cells = cells.to(x.dtype).contiguous()
    if is_compiled(x, convolution):
        after = None if epilogue is None or epilogue.fits(y) else epilogue
        within = epilogue if after is None else None
        native.forward_by_bases(first_or_last(x), weights, bases, cells, convolution, y, kept, within)
        return y if after is None else after.apply(y)
    mixed = _mixed_bases(bases, cells)
    for samples in _chunks(x, cells, weights):
        for index in range(samples.start, samples.stop):
            kernel = _kernels(weights[index : index + 1], mixed, convolution)[0]
            y[index : index + 1] = torch.ops.aten.convolution(x[index : index + 1], kernel, None, *_call(convolution))
    return y if epilogue is None else epilogue.apply(y)


def backward(
    gradient: Tensor,
    x: Tensor,
    ranked: Ranked,
    cells: Tensor,
    convolution: Convolution,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, FactorGradients | None, Tensor | None]:
    """Return the gradients of (x, factors, E).

    Args:
        gradient: of the output.
        x, ranked, cells, convolution: as in `forward`.
        needed: which of them are.
    """
    weights, bases = ranked.weights.to(x.dtype).contiguous(), ranked.bases.to(x.dtype).contiguous()
    stored = cells.to(x.dtype).contiguous()
    x = first_or_last(x)
    found = new_gradients(x, weights, stored, needed)
    if is_compiled(x, convolution):
        of_bases = native.backward_by_bases(first_or_last(gradient), x, weights, bases, stored, convolution, found)
    else:
        of_bases = _by_library(gradient, x, weights, bases, stored, convolution, found)
    if found.attention is None or of_bases is None:
        return found.x, None, found.cells
    exact = ranked.sizes.dtype
    return found.x, differentiate(ranked, found.attention.to(exact), of_bases.to(exact)), found.cells


def _by_library(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    bases: Tensor,
    cells: Tensor,
    convolution: Convolution,
    found: Gradients,
) -> Tensor | None:
    mixed, (stride, padding, dilation, *rest) = _mixed_bases(bases, cells), _call(convolution)
    of_mixed = torch.zeros_like(mixed, dtype=torch.promote_types(x.dtype, torch.float32))
    for samples in _chunks(x, cells, weights):
        for one in range(samples.start, samples.stop):
            place = slice(one, one + 1)
            kernel = _kernels(weights[place], mixed, convolution)[0]
            mask = [found.x is not None, found.of_kernels, False]
            of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
                gradient[place], x[place], kernel, None, stride, padding, dilation, *rest, mask
            )
            if found.x is not None:
                found.x[place] = of_x
            if found.of_kernels:
                block = split_kernels(of_kernel.unsqueeze(0), convolution)[0].flatten(1)  # [mixtures, cell]
                if found.attention is not None:
                    found.attention[one] = torch.einsum("mkc,mc->mk", mixed, block)
                of_mixed += weights[one].unsqueeze(-1) * block.unsqueeze(1)
    if found.cells is not None:
        torch.mm(
            bases.flatten(0, 1).t().to(of_mixed.dtype), of_mixed.flatten(0, 1), out=found.cells.view(len(cells), -1)
        )
    if found.attention is None:
        return None
    return torch.matmul(of_mixed, cells.flatten(1).t().to(of_mixed.dtype))


def _mixed_bases(bases: Tensor, cells: Tensor) -> Tensor:
    """Return B [mixtures, ranks, cell]."""
    return torch.matmul(bases, cells.flatten(1))


def _kernels(weights: Tensor, mixed: Tensor, convolution: Convolution) -> Tensor:
    blocks = torch.einsum("bmk,mkc->bmc", weights, mixed)
    return join_mixtures(blocks.unflatten(2, convolution.cell_shape), convolution)


def _chunks(x: Tensor, cells: Tensor, weights: Tensor) -> list[slice]:
    kernel = weights.shape[1] * math.prod(cells.shape[1:]) * x.element_size()
    return sample_chunks(len(x), kernel, x.device)


def _call(convolution: Convolution) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    geometry = list(convolution.stride), list(convolution.padding), list(convolution.dilation)
    return *geometry, False, [0] * convolution.dimensions, convolution.groups
