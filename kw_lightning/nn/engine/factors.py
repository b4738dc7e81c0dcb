"""The attention of a batch by its factors: hidden activations and the last linear layer, from which α can be made.

With many cells α [batch, mixtures, cells] is much larger than its factors, and its rank is little more than the
hidden layer's width: what is kept of a batch, and what kernels are mixed from, need not grow with the number of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.tiles import weighing
from kw_lightning.nn.engine.workspace import sample_chunks
from kw_lightning.nn.precision import in_type
from kw_lightning.nn.weighing import SMALLEST_SIZE


@dataclass(frozen=True)
class AttentionFactors:
    """α_ij = τ·β_ij + (1 − τ) · z_ij / (Σ_p |z_ip| + 1e-3) of a batch, where z = hidden · weightᵀ + bias.

    All but `initial` are of one type, of at least single precision.

    Attributes:
        hidden: [batch, width].
        weight: V, [mixtures · (cells + 1), width]; the last of a mixture's columns is the zero cell's.
        bias: c, [mixtures · (cells + 1)].
        temperature: τ, a scalar; it takes no gradient.
        initial: β, [mixtures]: the cell that a mixture starts as, the number of cells for none.
        lasting: weight, bias and cells do not change, as in evaluation: what is made of them may be kept.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    temperature: Tensor
    initial: Tensor
    lasting: bool = False

    @property
    def mixtures(self) -> int:
        """Return m."""
        return self.initial.shape[0]

    @property
    def told(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (hidden, weight, bias, initial, temperature), the arguments of the steps in C."""
        return self.hidden, self.weight, self.bias, self.initial, self.temperature

    def alpha(self) -> Tensor:
        """Return α [batch, mixtures, cells], by differentiable operators."""
        z = self.z(self.hidden)
        share = (1 - self.temperature) / (torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True) + SMALLEST_SIZE)
        return self.begin(z.shape[-1] - 1) + z[..., :-1] * share

    def z(self, hidden: Tensor) -> Tensor:
        """Return z [samples, mixtures, cells + 1] of some samples' hidden activations."""
        return F.linear(hidden, self.weight, self.bias).unflatten(-1, (self.mixtures, -1))

    def products(self, hidden: Tensor) -> Tensor:
        """Return z without the bias, in order: [samples, mixtures, cells + 1]."""
        return torch.mm(hidden, self.weight.t()).view(len(hidden), self.mixtures, -1)

    def begin(self, cells: int) -> Tensor:
        """Return τ·β [mixtures, cells]; τ is rounded to single precision, as the published code does."""
        one_hot = torch.arange(cells, device=self.initial.device) == self.initial.unsqueeze(-1)
        return one_hot * in_type(in_type(self.temperature, torch.float32), self.hidden.dtype)


class FactorGradients(NamedTuple):
    """The gradients of (hidden, weight, bias)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def make_alpha(factors: AttentionFactors, dtype: torch.dtype | None = None, multiple: int = 1) -> Tensor:
    """Return α [batch, mixtures, cells] as `AttentionFactors.alpha` does, with less memory and no derivative.

    Args:
        factors: of the attention.
        dtype: of α, rounded from single precision; None for that of the factors.
        multiple: α is padded with zeros to a multiple of so many cells.
    """
    dtype = dtype or factors.hidden.dtype
    if native.weighs(factors.hidden):
        return _fill(native.weigh(*factors.told), dtype, multiple)
    if weighing.weighs(factors.hidden, len(factors.bias) // factors.mixtures):
        z, bias, initial = factors.products(factors.hidden), factors.bias, factors.initial
        return weighing.weigh(z, bias, initial, factors.temperature, dtype, multiple)
    return _fill(_weigh(factors), dtype, multiple)


def _weigh(factors: AttentionFactors) -> Tensor:
    z = factors.z(factors.hidden)
    size = torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True) + SMALLEST_SIZE
    alpha = z[..., :-1]
    return torch.addcmul(factors.begin(alpha.shape[-1]), alpha, (1 - factors.temperature) / size)


def _fill(alpha: Tensor, dtype: torch.dtype, multiple: int) -> Tensor:
    fill = -alpha.shape[-1] % multiple
    alpha = in_type(alpha, dtype)
    return F.pad(alpha, (0, fill)) if fill else alpha


def differentiate_alpha(factors: AttentionFactors, gradient: Tensor) -> FactorGradients:
    """Return the gradients of the factors from that of α [batch, mixtures, cells]; z is made anew, in chunks."""
    if native.weighs(factors.hidden):
        return FactorGradients(*native.differentiate_weights(gradient, *factors.told))
    found = _new_gradients(factors)
    for samples in _chunks(factors):
        hidden, part = factors.hidden[samples], gradient[samples]
        if weighing.weighs(hidden, len(factors.bias) // factors.mixtures):
            of_z = factors.products(hidden)
            weighing.differentiate_weights(of_z, factors.bias, part, factors.temperature)
        else:
            of_z = _differentiate_weights(factors, factors.z(hidden), part)
        _add(found, factors, samples, of_z)
    return found


def _differentiate_weights(factors: AttentionFactors, z: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of z, whose memory is reused, from that of α."""
    size = torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True) + SMALLEST_SIZE
    share = (1 - factors.temperature) / size
    of_z = z.new_empty(z.shape)
    of_size = torch.linalg.vecdot(gradient, z[..., :-1]).unsqueeze(-1) * (share / -size)
    torch.mul(z.sign_(), of_size, out=of_z)
    of_z[..., :-1].addcmul_(gradient, share)
    return of_z


def make_sizes(factors: AttentionFactors) -> Tensor:
    """Return Σ|z| + 1e-3 of every mixture, [batch, mixtures]; z is made for a chunk of samples at a time."""
    if native.weighs(factors.hidden):
        return native.add_up(*factors.told)
    sizes = factors.hidden.new_empty(len(factors.hidden), factors.mixtures)
    for samples in _chunks(factors):
        torch.linalg.vector_norm(factors.z(factors.hidden[samples]), ord=1, dim=-1, out=sizes[samples])
    return sizes.add_(SMALLEST_SIZE)


def differentiate_sizes(factors: AttentionFactors, gradient: Tensor) -> FactorGradients:
    """Return the gradients of the factors from that of `make_sizes`, [batch, mixtures]."""
    if native.weighs(factors.hidden):
        return FactorGradients(*native.differentiate_weights(gradient, *factors.told))
    found = _new_gradients(factors)
    for samples in _chunks(factors):
        z = factors.z(factors.hidden[samples])
        _add(found, factors, samples, z.sign_().mul_(gradient[samples].unsqueeze(-1)))
    return found


def _chunks(factors: AttentionFactors) -> list[slice]:
    hidden = factors.hidden
    return sample_chunks(len(hidden), len(factors.bias) * hidden.element_size(), hidden.device)


def _new_gradients(factors: AttentionFactors) -> FactorGradients:
    """Return memory for the gradients, zero where there are no samples to write it."""
    tensors = factors.hidden, factors.weight, factors.bias
    make = torch.empty_like if len(factors.hidden) else torch.zeros_like
    return FactorGradients(*(make(tensor, memory_format=torch.contiguous_format) for tensor in tensors))


def _add(found: FactorGradients, factors: AttentionFactors, samples: slice, of_z: Tensor) -> None:
    """From the gradient of z of some samples, write that of their hidden activations, and add to the weights'."""
    rows = of_z.flatten(1)
    torch.mm(rows, factors.weight, out=found.hidden[samples])
    if samples.start == 0:
        torch.mm(rows.t(), factors.hidden[samples], out=found.weight)
        torch.sum(rows, 0, out=found.bias)
        return
    found.weight.addmm_(rows.t(), factors.hidden[samples])
    found.bias.add_(rows.sum(0))
