"""Dynamic layers: drop-in replacements of `nn.Conv1d/2d/3d` and `nn.Linear` that draw on a warehouse.

Paper: KernelWarehouse (ICML 2024), section 3. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.engine import (
    AttentionFactors,
    Convolution,
    Epilogue,
    dynamic_convolution,
    dynamic_linear,
    evaluates,
    needs_alpha,
    work,
)
from kw_lightning.nn.engine.evaluation import Evaluation
from kw_lightning.nn.engine.reference import assemble_kernels
from kw_lightning.nn.evaluation import find_call
from kw_lightning.nn.gates import OPEN, Factors
from kw_lightning.nn.partition import LayerPartition, Shape
from kw_lightning.nn.precision import compute_type, in_type
from kw_lightning.nn.warehouse import Warehouse
from kw_lightning.nn.weighing import CellWeights, LearntWeights
from kw_lightning.nn.weight import DynamicWeight, over_rows

NOTHING = Epilogue()
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class KWLayer(nn.Module):
    """What every dynamic layer has: a share of a warehouse, an attention of its own and a bias.

    A layer is made without a warehouse; `kw_lightning.nn.share_warehouse` gives several layers one.

    Attributes:
        kernel_shape: [out_channels, in_channels / groups, *kernel_size]; of a linear layer [out, in].
        warehouse: the cells; a submodule of its first layer alone, referred to by the others.
        attention: gives α [batch, mixtures, cells], or [1, mixtures, cells] where no sample changes it; a forward hook
            on it sees them.
        partition: the layer's place in its warehouse.
        engine: the order of contraction, see nn/engine/README.md.
        epilogue: whether it may do in evaluation what comes after it, see `kw_lightning.nn.finishing`.
        name: the layer's name in the network that was converted, for messages.
        output_scale: [out_channels], a batch norm that was folded into the layer; None where none was.
    """

    kernel_shape: Shape
    bias: nn.Parameter | None
    output_scale: Tensor | None
    warehouse: Warehouse | None
    attention: CellWeights | None
    channels_last = False
    epilogue = True

    def __init__(self) -> None:
        super().__init__()
        self.warehouse = None
        self.attention = None
        self.partition: LayerPartition | None = None
        self.engine = "auto"
        self.name = ""
        self.register_buffer("output_scale", None)

    @property
    def weight(self) -> DynamicWeight:
        """Return the shape, type and device of the static kernel that the layer stands for, without numbers.

        Set, it takes only what it gave, with factors of the output channels: so a batch norm is folded into a layer.
        """
        like = torch.empty(()) if self.warehouse is None else self.warehouse.cells
        return DynamicWeight(self.name or type(self).__name__, self.kernel_shape, like)

    @weight.setter
    def weight(self, weight: object) -> None:
        if not isinstance(weight, DynamicWeight) or weight.shape != self.kernel_shape:
            found = type(weight).__name__
            raise TypeError(f"a dynamic layer takes no weight; load_kernel(kernel) starts from one: found {found}")
        if weight.scale is not None:
            before = 1 if self.output_scale is None else self.output_scale
            self.output_scale = before * weight.scale

    def attach(
        self,
        warehouse: Warehouse,
        partition: LayerPartition,
        *,
        owner: bool,
        dynamic: bool = True,
        **attention: Any,
    ) -> None:
        """Give the layer its share of a warehouse and make its attention.

        Args:
            owner: register the warehouse as this layer's submodule; true for its first layer alone.
            dynamic: whether every sample has weights of its own; else they are learnt as they are.
            attention: how it is made, see `ContrastingAttention`, or `LearntWeights` where it is not dynamic.
        """
        self.partition = partition
        options: Any = {"device": warehouse.cells.device, "dtype": warehouse.cells.dtype, **attention}
        if dynamic:
            options |= {"channels_last": self.channels_last, "out_channels": self.kernel_shape[0]}
            self.attention = ContrastingAttention(self._attention_channels, partition, **options)
        else:
            self.attention = LearntWeights(partition, **options)
        if owner:
            self.warehouse = warehouse
        else:
            # Past `nn.Module.__setattr__`, which would register the warehouse a second time.
            self.__dict__["warehouse"] = warehouse
        self.train(self.training)

    @torch.no_grad()
    def load_kernel(self, kernel: Tensor) -> float:
        """Start from a static kernel: at τ = 1 the layer then computes what the static one did.

        Args:
            kernel: [out_channels, in_channels / groups, *kernel_size].

        Returns:
            The relative error of the kernel so reached, 0 where the budget is 1 or more: under 1 some mixtures start
            as the zero cell and lose their part of it, or several start as one cell, which gets their mean.
        """
        warehouse, partition, _ = self._attached()
        cells = warehouse.cells
        blocks = split_kernel(kernel.to(cells), partition)
        initial = torch.tensor(partition.initial_cells, device=cells.device)
        kept = initial < partition.cells
        sums = torch.zeros_like(cells).index_add_(0, initial[kept], blocks[kept])
        counts = torch.bincount(initial[kept], minlength=len(cells))
        taken = counts > 0
        cells[taken] = sums[taken] / counts[taken].view(-1, *[1] * (cells.dim() - 1))
        lost = blocks.clone()
        lost[kept] -= cells[initial[kept]]
        norm = torch.linalg.vector_norm(blocks).clamp_min(torch.finfo(blocks.dtype).tiny)
        return float(torch.linalg.vector_norm(lost) / norm)

    def kernels(self, attention: Tensor) -> Tensor:
        """Return the kernels [batch, *kernel_shape] that the attention α [batch, mixtures, cells] mixes."""
        cells = self._attached()[0].cells
        kernels = assemble_kernels(attention.to(cells.dtype), cells, self._convolution())
        return kernels if self.output_scale is None else kernels * over_rows(self.output_scale, kernels.dim() - 1)

    def attend(self, x: Tensor) -> Tensor:
        """Return α [batch, mixtures, cells] for the layer's input."""
        weights, _ = self._attend(x, alpha=True)
        return weights.alpha() if isinstance(weights, AttentionFactors) else weights

    def _attend(self, x: Tensor, *, alpha: bool = False) -> tuple[Tensor | AttentionFactors, Factors]:
        """Return α, or its factors where they serve as well, and the factors of the channels for the layer's input.

        Args:
            alpha: α itself is wanted.
        """
        warehouse, _, attention = self._attached()
        if not isinstance(attention, ContrastingAttention):
            return attention(x, *warehouse.temperatures), OPEN
        by_factors = not alpha and not needs_alpha(self.engine) and self.factors_width(x.shape[0]) is not None
        if attention.gates is None and not by_factors:
            return attention(x, *warehouse.temperatures), OPEN
        hidden = attention.hidden(x)
        gates = OPEN if attention.gates is None else attention.gates(hidden, *warehouse.temperatures)
        if by_factors:
            return attention.factors(hidden, warehouse.temperature), gates
        return attention(x, *warehouse.temperatures, hidden=hidden), gates

    def factors_width(self, batch: int) -> int | None:
        """Return the width of the factors that the engine gets for a batch, None where it gets α."""
        attention, partition = self.attention, self.partition
        if not isinstance(attention, ContrastingAttention) or partition is None or not attention.has_factors:
            return None
        if attention.low_rank is None:
            return attention.reduce.out_features
        along_rank = work.mixes_along_rank(self.engine, self._convolution())
        return attention.factors_width(batch, math.prod(partition.cell_shape), along_rank=along_rank)

    def evaluation(self, x: Tensor, epilogue: Epilogue = NOTHING) -> Evaluation | None:
        """Return the layer's whole call for x, None where it is computed in steps; arguments are as of `finished`."""
        return None

    def _one_kernel(self, alpha: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the kernel [*kernel_shape] that α [1, mixtures, cells] mixes for all samples."""
        cells = self._attached()[0].cells
        return in_type(assemble_kernels(in_type(alpha, cells.dtype), cells, self._convolution())[0], dtype)

    @property
    def _attention_channels(self) -> int:
        raise NotImplementedError

    def _convolution(self) -> Convolution:
        raise NotImplementedError

    def _attached(self) -> tuple[Warehouse, LayerPartition, CellWeights]:
        if self.warehouse is None or self.partition is None or self.attention is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no warehouse yet: "
                "make one for it with kw_lightning.nn.share_warehouse([layer, ...])"
            )
        return self.warehouse, self.partition, self.attention

    def _traced(self, x: Any) -> Any:
        """Return the layer's output to torch.fx, for which it is a leaf as torch's own layers are."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no TorchScript: use torch.export.export(network, (example,)), "
            "or torch.jit.trace(network, example)"
        )

    def _within(self, epilogue: Epilogue, gates: Factors, x: Tensor) -> Epilogue | None:
        """Return what becomes of an output where it is made, the layer's own scale and bias first; None: not there."""
        if gates.output is not None or (epilogue is NOTHING and not evaluates(self.engine, x)):
            return None
        if self.output_scale is None and self.bias is None:
            return epilogue
        return Epilogue(self.output_scale, self.bias, epilogue.norm, epilogue.added, epilogue.activation)

    def _finish(self, y: Tensor, dimensions: int) -> Tensor:
        """Return an output times the scale, plus the bias, where there are such; its channels stand at -dimensions."""
        scale, bias = (
            None if factors is None else over_rows(in_type(factors, y.dtype), dimensions)
            for factors in (self.output_scale, self.bias)
        )
        if scale is not None and bias is not None:
            return torch.addcmul(bias, y, scale)
        if scale is not None:
            return y * scale
        return y if bias is None else y + bias

    def _make_bias(self, channels: int, bias: bool, factory: dict[str, Any]) -> None:
        self.bias = nn.Parameter(torch.empty(channels, **factory)) if bias else None

    def reset_parameters(self) -> None:
        """Draw the bias as `nn.Linear` and `nn.Conv2d` do; cells and attention have their own."""
        if self.bias is not None:
            bound = 1 / math.sqrt(max(math.prod(self.kernel_shape[1:]), 1))
            nn.init.uniform_(self.bias, -bound, bound)


class _KWConvNd(KWLayer):
    dimensions: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Shape,
        stride: int | Shape = 1,
        padding: int | Shape | str = 0,
        dilation: int | Shape = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} divides not both {in_channels} input and {out_channels} output channels")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = self._sides("kernel_size", kernel_size)
        self.stride = self._sides("stride", stride)
        self.dilation = self._sides("dilation", dilation)
        self.padding = padding if isinstance(padding, str) else self._sides("padding", padding)
        self.padding_mode = padding_mode
        self.kernel_shape = (out_channels, in_channels // groups, *self.kernel_size)
        before, after = self._padding_sides()
        # What the convolution cannot pad itself: unequal sides, and other values than zeros.
        self._pad_first = padding_mode != "zeros" or before != after
        self._padding = (0,) * self.dimensions if self._pad_first else before
        self._pad = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        self._make_bias(out_channels, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every sample with its own kernel.

        Args:
            x: [batch, in_channels, *size], or one sample [in_channels, *size].

        Returns:
            [batch, out_channels, *output size].

        Raises:
            RuntimeError: the layer has no warehouse yet; **or** x has not the layer's channels or type, **or** is
                smaller than the kernel.
            ValueError: an engine that cannot compute the layer, see `kw_lightning.nn.engine`.
        """
        if isinstance(x, Proxy):
            return self._traced(x)  # type: ignore[no-any-return]
        return self.finished(x, NOTHING)

    def finished(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        """Return what becomes of the layer's output for x, see `forward`: in plain evaluation, done where it is made.

        Args:
            epilogue: without scale and bias, which the layer has of its own; but for `NOTHING`, only where the engine
                `evaluates`.
        """
        call = self.evaluation(x, epilogue)
        if call is not None:
            return call.run(x, epilogue.added)
        single = x.dim() == self.dimensions + 1
        if single:
            x = x.unsqueeze(0)
        if x.dim() != self.dimensions + 2 or x.shape[1] != self.in_channels:
            sides = ", ".join(["size"] * self.dimensions)
            raise RuntimeError(f"expected x of [batch, {self.in_channels}, {sides}]: found {list(x.shape)}")
        warehouse, _, attention = self._attached()
        dtype = compute_type(x, warehouse.cells)
        weights, gates = self._attend(x)
        x = _gated(in_type(x, dtype), gates.input, self.dimensions + 1)
        if self._pad_first:
            x = F.pad(x, self._pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        convolution = self._convolution()
        convolution.check_size(tuple(x.shape[2:]))
        within = self._within(epilogue, gates, x) if attention.dynamic else None
        if attention.dynamic:
            y = dynamic_convolution(x, weights, warehouse.cells, convolution, self.engine, within)
        else:
            assert isinstance(weights, Tensor)  # factors are a dynamic attention's
            kernel = self._one_kernel(weights, dtype)
            y = CONVOLVE[self.dimensions](x, kernel, None, self.stride, self._padding, self.dilation, self.groups)
        if within is None:
            y = epilogue.apply(self._finish(_gated(y, gates.output, self.dimensions + 1), self.dimensions + 1))
        return y.squeeze(0) if single else y

    @property
    def _attention_channels(self) -> int:
        return self.in_channels

    def evaluation(self, x: Tensor, epilogue: Epilogue = NOTHING) -> Evaluation | None:
        """Return the layer's whole call for x, None where it is computed in steps; arguments are as of `finished`."""
        if torch.compiler.is_compiling() or type(self) not in CONVOLUTIONS:
            return None
        return find_call(self, x, epilogue) if epilogue is not NOTHING or evaluates(self.engine, x) else None

    @property
    def _geometry(self) -> tuple[Any, ...]:
        return self.kernel_shape, self.stride, self._padding, self.dilation, self.groups, self._pad_first

    def _convolution(self) -> Convolution:
        cell_shape = self._attached()[1].cell_shape
        return Convolution(self.kernel_shape, cell_shape, self.stride, self._padding, self.dilation, self.groups)

    def _sides(self, name: str, value: int | Shape) -> Shape:
        sides = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(sides) != self.dimensions:
            raise ValueError(f"{name} needs {self.dimensions} numbers: found {value}")
        return sides

    def _padding_sides(self) -> tuple[Shape, Shape]:
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0,) * self.dimensions, (0,) * self.dimensions
        if self.padding != "same":
            raise ValueError(f'padding is a number, one per dimension, "same" or "valid": found "{self.padding}"')
        if any(side != 1 for side in self.stride):
            raise ValueError(f'padding "same" needs stride 1: found {self.stride}')
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * self.dimensions:
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self.dimensions:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text + (f", warehouse={self.warehouse.name!r}" if self.warehouse else "")


class KWConv1d(_KWConvNd):
    """Dynamic 1-D convolution; arguments as `nn.Conv1d`. x: [batch, in_channels, length]."""

    dimensions = 1


class KWConv2d(_KWConvNd):
    """Dynamic 2-D convolution; arguments as `nn.Conv2d`. x: [batch, in_channels, height, width].

    Example:
        >>> layers = [KWConv2d(8, 16, 3, padding=1), KWConv2d(16, 16, 3, padding=1)]
        >>> share_warehouse(layers, budget=1)
        >>> layers[0](torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 16, 9, 9])
    """

    dimensions = 2


class KWConv3d(_KWConvNd):
    """Dynamic 3-D convolution; arguments as `nn.Conv3d`. x: [batch, in_channels, depth, height, width]."""

    dimensions = 3


CONVOLUTIONS: tuple[type[_KWConvNd], ...] = (KWConv1d, KWConv2d, KWConv3d)


class KWLinear(KWLayer):
    """Dynamic linear layer; arguments as `nn.Linear`. x: [batch, *tokens, in_features]: one matrix a sample.

    Args:
        batch_dim: the dimension of x that is the batch; 1 for [sequence, batch, in_features].

    Attributes:
        beside: name of a module nearby that works on [sequence, batch, channels]; None where there is none, or where
            `batch_dim` was said. The first input of three dimensions then brings a warning.
    """

    channels_last = True
    beside: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        if batch_dim < 0:
            raise ValueError(f"batch_dim is a dimension, 0 or more: found {batch_dim}")
        self.in_features, self.out_features, self.batch_dim = in_features, out_features, batch_dim
        self.kernel_shape = (out_features, in_features)
        self._make_bias(out_features, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply every sample's tokens by the sample's own matrix.

        Args:
            x: [batch, *tokens, in_features], the batch at `batch_dim`; of fewer dimensions it is one sample.

        Returns:
            [batch, *tokens, out_features], the batch where it was.

        Raises:
            RuntimeError: the layer has no warehouse yet; **or** x has not the layer's features or type.
        """
        if isinstance(x, Proxy):
            return self._traced(x)  # type: ignore[no-any-return]
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"expected x of [batch, ..., {self.in_features}]: found {list(x.shape)}")
        warehouse, _, attention = self._attached()
        if not attention.dynamic:
            dtype = compute_type(x, warehouse.cells)
            return self._finish(F.linear(in_type(x, dtype), self._one_kernel(self.attend(x), dtype)), 1)
        if x.dim() < self.batch_dim + 2:
            return self._apply_matrices(x.unsqueeze(0)).squeeze(0)
        if self.batch_dim:
            return self._apply_matrices(x.movedim(self.batch_dim, 0)).movedim(0, self.batch_dim)
        if self.beside is not None and x.dim() > 2 and not torch.compiler.is_compiling():
            self._doubt_batch(x)
        return self._apply_matrices(x)

    def _apply_matrices(self, x: Tensor) -> Tensor:
        cells = self._attached()[0].cells
        dtype = compute_type(x, cells)
        attention, gates = self._attend(x)
        tokens = in_type(x, dtype)
        tokens = tokens.unsqueeze(1) if x.dim() == 2 else tokens.flatten(1, -2)
        within = self._within(NOTHING, gates, x)
        y = dynamic_linear(_gated(tokens, gates.input, 1), attention, cells, self._convolution(), self.engine, within)
        y = y if within is not None else self._finish(_gated(y, gates.output, 1), 1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _doubt_batch(self, x: Tensor) -> None:
        warehouse = self._attached()[0]
        if not warehouse.doubted:
            warehouse.doubted = True
            warnings.warn(
                f'"{self.name}" takes dimension 0 of {list(x.shape)} for the batch, and stands beside "{self.beside}", '
                f'which works on [sequence, batch, channels]. Say batch_dim: 1 in warehouse "{warehouse.name}" where '
                "its layers do too, since samples mix otherwise, and batch_dim: 0 where they do not",
                stacklevel=3,
            )
        self.beside = None

    @property
    def _attention_channels(self) -> int:
        return self.in_features

    def _convolution(self) -> Convolution:
        return Convolution(self.kernel_shape, self._attached()[1].cell_shape)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}"
        if self.batch_dim:
            text += f", batch_dim={self.batch_dim}"
        if self.bias is None:
            text += ", bias=False"
        return text + (f", warehouse={self.warehouse.name!r}" if self.warehouse else "")


def _gated(x: Tensor, factors: Tensor | None, dimensions: int) -> Tensor:
    """Return x times factors [batch, channels] of its channels, which stand at -dimensions; x itself without any."""
    if factors is None:
        return x
    shape = (factors.shape[0], *[1] * (x.dim() - 1 - dimensions), -1, *[1] * (dimensions - 1))
    return x * in_type(factors, x.dtype).view(shape)


def split_kernel(kernel: Tensor, partition: LayerPartition) -> Tensor:
    """Cut a kernel [out, in / groups, *size] into mixtures [mixtures, co, ci, *ck]: `assemble_kernels` backwards."""
    spatial, out_groups, in_groups = partition.grid
    cell_out, cell_in, *cell_size = partition.cell_shape
    sides = [side for pair in zip(spatial, cell_size, strict=True) for side in pair]
    blocks = kernel.reshape(out_groups, cell_out, in_groups, cell_in, *sides)
    dimensions = range(len(spatial))
    order = [4 + 2 * d for d in dimensions] + [0, 2, 1, 3] + [5 + 2 * d for d in dimensions]
    return blocks.permute(order).reshape(partition.mixtures, *partition.cell_shape)
