"""Contrasting-driven attention: from a layer's input to the weights of its linear mixtures.

Paper: KernelWarehouse (ICML 2024), section 3.3, equations 3 and 4. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kw_lightning.nn.partition import LayerPartition, Start
from kw_lightning.nn.precision import autocast_type, in_type

LARGEST_MEAN = 1e15  # of an input channel; its square has room in float32
SMALLEST_SIZE = 1e-3  # added to Σ|z|, as published
LARGEST_SUM = 1 / (1 + SMALLEST_SIZE)  # of |α| over a mixture's cells where Σ|z| = 1
MINIMUM_WIDTH = 16  # of the hidden layer and of the low-rank form's basis
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ContrastingAttention(nn.Module):
    """Gives every sample its own weights α [batch, mixtures, cells], which may be negative.

    x → mean over positions → `reduce` → `norm` → ReLU → `expand` = z, and then, with temperature τ,
    α_ij = τ·β_ij + (1 − τ) · z_ij / (Σ_p |z_ip| + 1e-3), where p also runs over the zero cell.
    Without a start (`start="none"`) there is no β, and τ has no effect: α_ij = z_ij / (Σ_p |z_ip| + 1e-3).

    The low-rank form (`basis`) gives z from fewer numbers; see the README beside this file and the paper's appendix.

    A training batch of one sample or none has no batch statistics: the norm then uses its running statistics and leaves
    them as they are, so that a last batch of one does not end a run.

    Args:
        in_channels: channels of the layer's input.
        partition: the layer's place in its warehouse.
        reduction: hidden width relative to `in_channels`; never under 16.
        norm: "batch" or "layer".
        basis: ratio of the low-rank form, None for the full form.
        start: "none" for an attention without β; "own" and "shared" differ in the partition.
        channels_last: the input is [batch, ..., in_channels] (linear layers) instead of [batch, in_channels, ...].
    """

    start: Tensor

    def __init__(
        self,
        in_channels: int,
        partition: LayerPartition,
        *,
        reduction: Fraction | float = Fraction(1, 16),
        norm: Literal["batch", "layer"] = "batch",
        basis: Fraction | float | None = None,
        start: Start = "own",
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        width = attention_width(in_channels, reduction)
        self.in_channels = in_channels
        self.mixtures = partition.mixtures
        self.cells = partition.cells
        self.first_cell = partition.first_cell
        self.channels_last = channels_last
        self.annealed = start != "none"
        self.reduce = nn.Linear(in_channels, width, bias=norm == "layer", **factory)
        self.norm = nn.BatchNorm1d(width, **factory) if norm == "batch" else nn.LayerNorm(width, **factory)
        self.basis: nn.Linear | None = None
        self.basis_bias: nn.Parameter | None = None
        if basis is None:
            self.expand = nn.Linear(width, self.mixtures * (self.cells + 1), **factory)
        else:
            self.own_cells, rank = basis_shape(partition, basis)
            self.expand = nn.Linear(width, self.mixtures * (self.own_cells + rank + 1), bias=False, **factory)
            self.basis = nn.Linear(rank, self.cells - self.own_cells, bias=False, **factory)
            self.basis_bias = nn.Parameter(torch.zeros(self.mixtures, self.cells + 1, **factory))
        self.initial_cells = partition.initial_cells
        # β. No buffer: averages of the weights may go over buffers, and it is no weight.
        self.start = self._make_start(self.norm.weight.device)
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

    @torch.no_grad()
    def start_from(self, weights: Tensor) -> None:
        """Start z so that at τ = 0 every sample gets the same weights; training makes them differ.

        The zero cell takes what the weights leave of Σ|z| = 1. As in a low-rank update that starts at zero, the last
        linear layer's weight is 0 and its input is not, so that it learns from the first step.

        Args:
            weights: α [mixtures, cells] at the start, with Σ_j |α_ij| ≤ `LARGEST_SUM`.
        """
        z = weights / LARGEST_SUM
        z = torch.cat([z, 1 - z.abs().sum(dim=-1, keepdim=True)], dim=-1)
        bias = self.expand.bias if self.basis_bias is None else self.basis_bias
        nn.init.zeros_(self.expand.weight)
        bias.copy_(z.view_as(bias))

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        """Return α of the samples of x.

        Args:
            x: [batch, in_channels, *size], or [batch, *tokens, in_channels] with `channels_last`.
            temperature: τ, a scalar tensor.

        Returns:
            [batch, mixtures, cells] in float32, or float64 where x is float64: half precision has no room for the
            normalisation, under autocast neither.
        """
        if autocast_type(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return self._attend(_within_reach(self._pool(x)), temperature)
        pooled = self._pool(x)
        return self._attend(_within_reach(pooled) if x.dtype.itemsize < 4 else pooled, temperature)

    def _pool(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = list(range(1, x.dim() - 1)) if self.channels_last else list(range(2, x.dim()))
        if not positions:
            return in_type(x, dtype)
        if 0 in x.shape[1:]:  # the mean of no positions is not a number, and so would all gradients be
            return x.sum(dim=positions, dtype=dtype)
        return x.mean(dim=positions, dtype=dtype)

    def _attend(self, pooled: Tensor, temperature: Tensor) -> Tensor:
        hidden = self._normalise(_linear(pooled, self.reduce))
        return self._anneal(self._expand(F.relu(hidden)), temperature)

    def _normalise(self, hidden: Tensor) -> Tensor:
        norm = self.norm
        # A network turned to half precision as a whole has a norm in half precision, which takes only its own type.
        x = in_type(hidden, norm.weight.dtype)
        if isinstance(norm, nn.BatchNorm1d) and norm.training and x.shape[0] <= 1:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = norm(x)
        return in_type(x, hidden.dtype)

    def _expand(self, hidden: Tensor) -> Tensor:
        z = _linear(hidden, self.expand)
        z = z.unflatten(-1, (self.mixtures, -1))
        if self.basis is None or self.basis_bias is None:
            return z
        rank = self.basis.in_features
        own, compact, zero = z.split([self.own_cells, rank, 1], dim=-1)
        other = _linear(compact, self.basis)
        before, after = other[..., : self.first_cell], other[..., self.first_cell :]
        return torch.cat([before, own, after, zero], dim=-1) + in_type(self.basis_bias, z.dtype)

    def _anneal(self, z: Tensor, temperature: Tensor) -> Tensor:
        # Small maps leave a layer little else to do than this: few operations, each on all mixtures.
        size = torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True)
        if not self.annealed:
            return z[..., :-1] / (size + SMALLEST_SIZE)
        scale = in_type(1 - temperature, z.dtype) / (size + SMALLEST_SIZE)
        # The published code keeps β in float32; τβ is rounded alike, else its numbers hold to 1e-8 only.
        start = self._start_on(z.device) * in_type(temperature, torch.float32)
        return torch.addcmul(in_type(start, z.dtype), z[..., :-1], scale)

    def _start_on(self, device: torch.device) -> Tensor:
        """Return β on a device: weights may have come there without `_apply`, by assignment for one."""
        if self.start.device == device:
            return self.start
        start = self._make_start(device)
        # What a transform of torch.func or a mode of imaginary tensors makes is not for other calls.
        if type(start) is Tensor and not torch._C._are_functorch_transforms_active():
            self.start = start
        return start

    def _make_start(self, device: torch.device) -> Tensor:
        """Return β [mixtures, cells]: the cell that each mixture starts as."""
        with torch.inference_mode(False):  # it outlives the call that makes it
            initial = torch.tensor(self.initial_cells, device=device)
            return (torch.arange(self.cells, device=device) == initial.unsqueeze(-1)).to(torch.float32)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self._start_on(self.norm.weight.device)
        return self

    def extra_repr(self) -> str:
        form = "" if self.basis is None else f", basis={self.basis.in_features}"
        form += "" if self.annealed else ", start='none'"
        return f"mixtures={self.mixtures}, cells={self.cells}{form}"


def attention_width(in_channels: int, reduction: Fraction | float) -> int:
    """Return the hidden width of the attention, h = max(int(in_channels · reduction), 16)."""
    share = reduction if isinstance(reduction, Fraction) else Fraction(str(reduction))
    return max(in_channels * share.numerator // share.denominator, MINIMUM_WIDTH)


def basis_shape(partition: LayerPartition, basis: Fraction | float) -> tuple[int, int]:
    """Return the low-rank form's (own cells, rank) = (int(b·m), max(int((n − own) · basis), 16))."""
    return _low_rank(partition.mixtures, partition.cells, partition.budget, basis)


def _low_rank(mixtures: int, cells: int, budget: Fraction, basis: Fraction | float) -> tuple[int, int]:
    own = min(math.floor(budget * mixtures), cells)
    return own, max(math.floor((cells - own) * Fraction(str(basis))), MINIMUM_WIDTH)


def attention_parameters(
    in_channels: int,
    partition: LayerPartition,
    *,
    reduction: Fraction | float = Fraction(1, 16),
    norm: Literal["batch", "layer"] = "batch",
    basis: Fraction | float | None = None,
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
    )


def attention_size(
    in_channels: int,
    mixtures: int,
    cells: int,
    budget: Fraction,
    *,
    reduction: Fraction | float = Fraction(1, 16),
    norm: Literal["batch", "layer"] = "batch",
    basis: Fraction | float | None = None,
) -> int:
    """Return what `attention_parameters` does, from the numbers that it depends on.

    Args:
        in_channels: of the layer.
        mixtures: m, of the layer.
        cells: n, of the warehouse.
        budget: b, of the warehouse.
        reduction, norm, basis: see `ContrastingAttention`.
    """
    width = attention_width(in_channels, reduction)
    shared = in_channels * width + (width if norm == "layer" else 0) + 2 * width
    columns = mixtures * (cells + 1)
    if basis is None:
        return shared + (width + 1) * columns
    own, rank = _low_rank(mixtures, cells, budget, basis)
    return shared + width * mixtures * (own + rank + 1) + rank * (cells - own) + columns


def _within_reach(pooled: Tensor) -> Tensor:
    """Return finite means of what may come from half precision.

    bfloat16 reaches as far as float32: sums of its largest values, and their squares in the norm, would overflow.
    """
    return pooled.nan_to_num(0.0).clamp(-LARGEST_MEAN, LARGEST_MEAN)


def _linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Call a linear layer in the type of x: half networks attend in float32.

    It is called as a module, so that parametrizations, pruning, quantization and hooks on it do what they are for.
    """
    own = linear._parameters.get("weight")
    if own is None:
        own = next(linear.parameters(), None)
    if own is None or own.dtype == x.dtype:
        y: Tensor = linear(x)
        return y
    if type(linear) is nn.Linear and not any(vars(linear)[hooks] for hooks in HOOKS):
        # What the call below does, in a third of its time.
        return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    tensors = (*linear.named_parameters(), *linear.named_buffers())
    cast = {name: tensor.to(x.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors}
    return functional_call(linear, cast, (x,))  # type: ignore[no-any-return]
