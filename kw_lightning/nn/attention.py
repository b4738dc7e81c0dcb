"""Contrasting-driven attention: from a layer's input to the weights of its linear mixtures.

Paper: KernelWarehouse (ICML 2024), section 3.3, equations 3 and 4. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.errors import mistake
from kw_lightning.nn import low_rank
from kw_lightning.nn.engine.factors import AttentionFactors
from kw_lightning.nn.gates import ChannelGates, Side
from kw_lightning.nn.hidden import activate
from kw_lightning.nn.low_rank import LowRank, multiply_out
from kw_lightning.nn.partition import LayerPartition, Start
from kw_lightning.nn.pooling import is_half, within_reach
from kw_lightning.nn.precision import (
    PLAIN,
    autocast_type,
    call_linear,
    in_type,
    is_plain,
    is_recorded,
    without_autocast,
)
from kw_lightning.nn.weighing import CellWeights, Function, columns

Norm = Literal["batch", "layer"]
NORMS: tuple[Norm, ...] = ("batch", "layer")
MINIMUM_WIDTH = 16  # of the hidden layer and of the low-rank form's basis


class ContrastingAttention(CellWeights):
    """Gives every sample its own weights α [batch, mixtures, cells], which may be negative where they are contrasted.

    x → mean over positions → `reduce` → `norm` → ReLU → `expand` = z, and then, with temperature τ,
    α_ij = τ·β_ij + (1 − τ) · z_ij / (Σ_p |z_ip| + 1e-3), where p also runs over the zero cell; see `CellWeights`.

    The low-rank form (`basis`) gives z from fewer numbers; see the README beside this file and the paper's appendix.

    A training batch of one sample or none has no batch statistics: the norm then uses its running statistics and leaves
    them as they are, so that a last batch of one does not end a run.

    Args:
        in_channels: channels of the layer's input.
        partition: the layer's place in its warehouse.
        reduction: hidden width relative to `in_channels`; never under 16.
        norm: "batch" or "layer".
        basis: ratio of the low-rank form, None for the full form.
        start, function: see `CellWeights`.
        gates: which channels have gates, "input" and "output"; see `ChannelGates`.
        out_channels: of the layer, for a gate.
        channels_last: the input is [batch, ..., in_channels] (linear layers) instead of [batch, in_channels, ...].
    """

    def __init__(
        self,
        in_channels: int,
        partition: LayerPartition,
        *,
        reduction: Fraction | float = Fraction(1, 16),
        norm: Norm = "batch",
        basis: Fraction | float | None = None,
        start: Start = "own",
        function: Function = "contrast",
        gates: Collection[Side] = (),
        out_channels: int = 0,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(partition, start, function)
        if norm not in NORMS:
            raise ValueError(mistake(norm, NORMS, what="the unknown norm"))
        factory: Any = {"device": device, "dtype": dtype}
        width = attention_width(in_channels, reduction)
        self.in_channels = in_channels
        self.channels_last = channels_last
        self.reduce = nn.Linear(in_channels, width, bias=norm == "layer", **factory)
        self.norm = nn.BatchNorm1d(width, **factory) if norm == "batch" else nn.LayerNorm(width, **factory)
        self.basis: nn.Linear | None = None
        self.low_rank: LowRank | None = None
        self.basis_bias: nn.Parameter | None = None
        if basis is None:
            self.expand = nn.Linear(width, self.mixtures * self.columns, **factory)
        else:
            self.low_rank = low_rank_form(partition, basis, width)
            self.own_cells, rank = self.low_rank.own, self.low_rank.rank
            others = self.cells - self.own_cells
            self.expand = nn.Linear(width, self.mixtures * (rank + self.columns - others), bias=False, **factory)
            self.basis = nn.Linear(rank, others, bias=False, **factory)
            self.basis_bias = nn.Parameter(torch.zeros(self.mixtures, self.columns, **factory))
        if gates:
            self.gates = ChannelGates(width, in_channels, out_channels, gates, annealed=self.annealed, **factory)
        # β. No buffer: averages of the weights may go over buffers, and it is no weight.
        self.start = self._make_start(self.norm.weight.device)
        self._initial_on(self.norm.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start values: Kaiming normal (fan out, ReLU) for weights, 0 for biases."""
        for linear in (self.reduce, self.expand, self.basis):
            if linear is not None:
                nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        if self.basis_bias is not None:
            nn.init.zeros_(self.basis_bias)
        self.norm.reset_parameters()
        if self.gates is not None:
            self.gates.reset_parameters()

    def _start_z(self, z: Tensor) -> None:
        # As in a low-rank update that starts at zero, the last linear layer's weight is 0 and its input is not, so that
        # it learns from the first step.
        bias = self.expand.bias if self.basis_bias is None else self.basis_bias
        nn.init.zeros_(self.expand.weight)
        bias.copy_(z.view_as(bias))

    def hidden(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """Return what α and the gates of the samples of x are made of, [batch, width], in the type of `forward`.

        Args:
            x: as in `forward`.
            means: of x over its positions, [batch, in_channels], if they are known already; within reach.
        """
        if means is not None or is_half(x):
            with without_autocast(x.device):
                return self._hidden(within_reach(self._pool(x)) if means is None else means)
        if x.dim() > 2 and not is_recorded():
            found = activate(self._positions_last(x), self.reduce, self.norm)
            if found is not None:
                return found
        return self._hidden(self._pool(x))

    def forward(
        self,
        x: Tensor,
        temperature: Tensor,
        softmax_temperature: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return α of the samples of x.

        Args:
            x: [batch, in_channels, *size], or [batch, *tokens, in_channels] with `channels_last`.
            temperature: τ, a scalar tensor.
            softmax_temperature: T of the softmax, a scalar tensor; None means 1.
            hidden: what `hidden(x)` gave, if it has been asked already: a norm in training counts every call.

        Returns:
            [batch, mixtures, cells] in float32, or float64 where x is float64: half precision has no room for the
            normalisation, under autocast neither.
        """
        if hidden is None:
            hidden = self.hidden(x)
        if autocast_type(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self.weigh(self._expand(hidden), temperature, softmax_temperature)
        return self.weigh(self._expand(hidden), temperature, softmax_temperature)

    @property
    def has_factors(self) -> bool:
        """Return whether `factors` gives all that α is.

        It does for contrasted weights, unless a hook, a parametrization or the like on the last linear layers or on the
        attention itself has to see α.
        """
        if self.function != "contrast" or not is_plain(self, ContrastingAttention):
            return False
        expand, basis = self.expand, self.basis
        if basis is None:
            return is_plain(expand, nn.Linear) and type(expand.weight) in PLAIN and type(expand.bias) in PLAIN
        tensors = expand.weight, basis.weight, self.basis_bias
        plain = is_plain(expand, nn.Linear) and is_plain(basis, nn.Linear)
        return plain and all(type(tensor) in PLAIN for tensor in tensors)

    def factors_width(self, batch: int, cell: int, *, along_rank: bool) -> int | None:
        """Return the width of the factors that it gives for a batch, None where α serves as well or better.

        The low-rank form gives them where that takes fewer multiply-adds, and never to one who counts operations.

        Args:
            batch: samples.
            cell: numbers of a cell.
            along_rank: whether kernels may be mixed of bases.
        """
        if not self.has_factors:
            return None
        form = self.low_rank
        if form is not None:
            recorded = is_recorded()
            if not recorded and torch._C._len_torch_dispatch_stack() > 0:
                return None
            still = self._is_still and not recorded
            if not form.counts_less(batch, cell, along_rank=along_rank, still=still):
                return None
        return self.reduce.out_features

    @property
    def _is_still(self) -> bool:
        return not self.training and not torch.is_grad_enabled()

    def factors(self, hidden: Tensor, temperature: Tensor) -> AttentionFactors:
        """Return what α of the samples is made of.

        Args:
            hidden: what `hidden(x)` gave.
            temperature: τ, a scalar tensor.
        """
        lasting = self._is_still and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        if self.annealed:
            tau = in_type(temperature, hidden.dtype)
            tau = tau if lasting else tau.clone()  # τ may be set before the backward pass
        else:
            tau = hidden.new_zeros(())
        weight, bias = self._last_layer(hidden.dtype)
        return AttentionFactors(hidden, weight, bias, tau, self._initial_on(hidden.device), lasting)

    def _last_layer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return V and c in a type, those of the low-rank form multiplied out."""
        weight, basis, bias = self.expand.weight, self.basis, self.basis_bias
        if self.low_rank is None or basis is None or bias is None:
            return in_type(weight, dtype), in_type(self.expand.bias, dtype)
        constant = in_type(bias, dtype).flatten()
        if is_recorded():
            return multiply_out(in_type(weight, dtype), in_type(basis.weight, dtype), self.low_rank), constant
        if self._is_still:
            return low_rank.keep(weight, basis.weight, self.low_rank, dtype), constant
        low_rank.forget(weight)
        return multiply_out(in_type(weight, dtype), in_type(basis.weight, dtype), self.low_rank), constant

    def _pool(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = list(range(1, x.dim() - 1)) if self.channels_last else list(range(2, x.dim()))
        if not positions:
            return in_type(x, dtype)
        if 0 in x.shape[1:]:  # the mean of no positions is not a number, and so would all gradients be
            return x.sum(dim=positions, dtype=dtype)
        if x.requires_grad and torch.is_grad_enabled() and not is_recorded():
            # The same mean. `mean` makes a map of its gradient, to be added to the layer's; this one's is [batch,
            # channels] seen as a map, and added in place.
            return x.sum(dim=positions, dtype=dtype) / math.prod(x.shape[position] for position in positions)
        return x.mean(dim=positions, dtype=dtype)

    def _positions_last(self, x: Tensor) -> Tensor:
        """Return x as [batch, channels, positions]."""
        if self.channels_last:
            return (x if x.dim() == 3 else x.flatten(1, -2)).transpose(1, 2)
        return x if x.dim() == 3 else x.flatten(2)

    def _hidden(self, pooled: Tensor) -> Tensor:
        found = activate(pooled, self.reduce, self.norm)
        return self._by_modules(pooled) if found is None else found

    def _by_modules(self, pooled: Tensor) -> Tensor:
        return F.relu(self._normalise(call_linear(pooled, self.reduce)))

    def _normalise(self, hidden: Tensor) -> Tensor:
        norm = self.norm
        # A network turned to half precision as a whole has a norm in half precision, which takes only its own type.
        x = in_type(hidden, norm.weight.dtype)
        if isinstance(norm, nn.BatchNorm1d) and _takes_running_statistics(norm, x):
            mean, variance = norm.running_mean, norm.running_var
            if norm.training and mean is not None and variance is not None:
                mean, variance = mean.clone(), variance.clone()  # a batch may come before the backward pass
            x = F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = norm(x)
        return in_type(x, hidden.dtype)

    def _expand(self, hidden: Tensor) -> Tensor:
        z = call_linear(hidden, self.expand)
        z = z.unflatten(-1, (self.mixtures, -1))
        if self.basis is None or self.basis_bias is None:
            return z
        rank = self.basis.in_features
        own, compact, zero = z.split([self.own_cells, rank, self.columns - self.cells], dim=-1)
        other = call_linear(compact, self.basis)
        before, after = other[..., : self.first_cell], other[..., self.first_cell :]
        return torch.cat([before, own, after, zero], dim=-1) + in_type(self.basis_bias, z.dtype)

    @property
    def _device(self) -> torch.device:
        return self.norm.weight.device

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.basis is None else f", basis={self.basis.in_features}")


def attention_width(in_channels: int, reduction: Fraction | float) -> int:
    """Return the hidden width of the attention, h = max(int(in_channels · reduction), 16)."""
    share = reduction if isinstance(reduction, Fraction) else Fraction(str(reduction))
    return max(in_channels * share.numerator // share.denominator, MINIMUM_WIDTH)


def factors_width(
    in_channels: int, reduction: Fraction | float, basis: Fraction | float | None, function: Function
) -> int | None:
    """Return the width of the factors that an attention hands to the engine; None where it hands over α."""
    return attention_width(in_channels, reduction) if function == "contrast" and basis is None else None


def basis_shape(partition: LayerPartition, basis: Fraction | float) -> tuple[int, int]:
    """Return the low-rank form's (own cells, rank) = (int(b·m), max(int((n − own) · basis), 16))."""
    return _low_rank(partition.mixtures, partition.cells, partition.budget, basis)


def low_rank_form(partition: LayerPartition, basis: Fraction | float, width: int) -> LowRank:
    """Return the shape of the low-rank form of an attention with a hidden layer of a width."""
    own, rank = basis_shape(partition, basis)
    return LowRank(partition.cells, own, partition.first_cell, rank, width)


def _low_rank(mixtures: int, cells: int, budget: Fraction, basis: Fraction | float) -> tuple[int, int]:
    own = min(math.floor(budget * mixtures), cells)
    return own, max(math.floor((cells - own) * Fraction(str(basis))), MINIMUM_WIDTH)


def attention_parameters(
    in_channels: int,
    partition: LayerPartition,
    *,
    reduction: Fraction | float = Fraction(1, 16),
    norm: Norm = "batch",
    basis: Fraction | float | None = None,
    function: Function = "contrast",
) -> int:
    """Return the number of parameters that a `ContrastingAttention` with these arguments has."""
    return attention_size(
        in_channels,
        partition.mixtures,
        partition.cells,
        partition.budget,
        reduction=reduction,
        norm=norm,
        basis=basis,
        function=function,
    )


def attention_size(
    in_channels: int,
    mixtures: int,
    cells: int,
    budget: Fraction,
    *,
    reduction: Fraction | float = Fraction(1, 16),
    norm: Norm = "batch",
    basis: Fraction | float | None = None,
    function: Function = "contrast",
    gated_channels: int = 0,
    dynamic: bool = True,
) -> int:
    """Return what `attention_parameters` does, from the numbers that it depends on.

    Args:
        in_channels: of the layer.
        mixtures: m, of the layer.
        cells: n, of the warehouse.
        budget: b, of the warehouse.
        reduction, norm, basis, function: see `ContrastingAttention`.
        gated_channels: of the layer's inputs and outputs together.
        dynamic: False for `LearntWeights`, which the first three say nothing to.
    """
    numbers = columns(cells, function)
    if not dynamic:
        return mixtures * numbers
    width = attention_width(in_channels, reduction)
    shared = in_channels * width + (width if norm == "layer" else 0) + 2 * width + (width + 1) * gated_channels
    if basis is None:
        return shared + (width + 1) * mixtures * numbers
    own, rank = _low_rank(mixtures, cells, budget, basis)
    others = cells - own
    return shared + width * mixtures * (rank + numbers - others) + rank * others + mixtures * numbers


def _takes_running_statistics(norm: nn.BatchNorm1d, x: Tensor) -> bool:
    """Return whether a norm's own call, which takes longer in evaluation, is left out."""
    if norm.training:
        return x.shape[0] <= 1
    return norm.running_mean is not None and is_plain(norm, nn.BatchNorm1d) and not is_recorded()
