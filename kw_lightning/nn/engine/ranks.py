"""Mixing along the attention's rank: kernels are mixed from bases of their own, as many as the hidden layer is wide.

A mixture's α of any sample is share · (V·h + c) + τ·β, so its block of the kernel is a mixture of the bases
B_k = Σ_j V_jk·E_j, of C = Σ_j c_j·E_j and of the cell that it starts as: exactly, for any number of cells. The bases
are mixed once for a batch; a sample's cost then depends on the width of the hidden layer, not on the number of cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kw_lightning.nn.engine.convolution import Convolution
from kw_lightning.nn.engine.factors import AttentionFactors, FactorGradients, differentiate_sizes, make_sizes
from kw_lightning.nn.engine.gradients import Gradients
from kw_lightning.nn.engine.reference import join_mixtures, split_kernels


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


def count(width: int) -> int:
    """Return the number of a mixture's bases: one for each hidden activation, and the constant."""
    return width + 1


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
    if float(factors.temperature) > 0:  # otherwise the initial cell has no part in the mixture
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


def forward(x: Tensor, weights: Tensor, bases: Tensor, cells: Tensor, convolution: Convolution, y: Tensor) -> None:
    """Write the convolution of every sample with its own kernel, by PyTorch's products, to test compiled passes.

    Args:
        x: [batch, in_channels, *size], not empty.
        weights: of the bases, [batch, mixtures, ranks].
        bases: by cells, [mixtures, ranks, cells].
        cells: E [cells, co, ci, *ck].
        y: [batch, out_channels, *output_size], overwritten.
    """
    mixed = _mixed_bases(bases, cells)
    for place in _samples(x):
        kernel = _kernels(weights[place], mixed, convolution)[0]
        y[place] = torch.ops.aten.convolution(x[place], kernel, None, *_call(convolution))


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    bases: Tensor,
    cells: Tensor,
    convolution: Convolution,
    wanted: Gradients,
) -> Tensor | None:
    """Write the gradients of (x, weights, cells), and return that of the bases where that of the weights is wanted.

    Args:
        gradient: of the output.
        x, weights, bases, cells, convolution: as in `forward`.
        wanted: where the gradients go.
    """
    mixed, (stride, padding, dilation, *rest) = _mixed_bases(bases, cells), _call(convolution)
    of_mixed = torch.zeros_like(mixed, dtype=torch.promote_types(x.dtype, torch.float32))
    mask = [wanted.x is not None, wanted.of_kernels, False]
    for place in _samples(x):
        kernel = _kernels(weights[place], mixed, convolution)[0]
        of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
            gradient[place], x[place], kernel, None, stride, padding, dilation, *rest, mask
        )
        if wanted.x is not None:
            wanted.x[place] = of_x
        if wanted.of_kernels:
            block = split_kernels(of_kernel.unsqueeze(0), convolution)[0].flatten(1)  # [mixtures, cell]
            if wanted.attention is not None:
                wanted.attention[place] = torch.einsum("mkc,mc->mk", mixed, block)
            of_mixed += weights[place][0].unsqueeze(-1) * block.unsqueeze(1)
    if wanted.cells is not None:
        by_cell = bases.flatten(0, 1).t().to(of_mixed.dtype)
        torch.mm(by_cell, of_mixed.flatten(0, 1), out=wanted.cells.view(len(cells), -1))
    if wanted.attention is None:
        return None
    return torch.matmul(of_mixed, cells.flatten(1).t().to(of_mixed.dtype))


def _mixed_bases(bases: Tensor, cells: Tensor) -> Tensor:
    """Return B [mixtures, ranks, cell]."""
    return torch.matmul(bases, cells.flatten(1))


def _kernels(weights: Tensor, mixed: Tensor, convolution: Convolution) -> Tensor:
    blocks = torch.einsum("bmk,mkc->bmc", weights, mixed)
    return join_mixtures(blocks.unflatten(2, convolution.cell_shape), convolution)


def _samples(x: Tensor) -> list[slice]:
    """Return every sample by itself."""
    return [slice(index, index + 1) for index in range(len(x))]


def _call(convolution: Convolution) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    geometry = list(convolution.stride), list(convolution.padding), list(convolution.dilation)
    return *geometry, False, [0] * convolution.dimensions, convolution.groups
