"""What all dynamic layers have: a share of a warehouse, an attention and a bias.

Paper: KernelWarehouse (ICML 2024), section 3. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.nn.attention import ContrastingAttention
from kw_lightning.nn.engine import (
    AttentionFactors,
    Convolution,
    Epilogue,
    evaluates,
    needs_alpha,
    work,
)
from kw_lightning.nn.engine.evaluation import Evaluation
from kw_lightning.nn.engine.reference import assemble_kernels
from kw_lightning.nn.evaluation import find_call
from kw_lightning.nn.gates import OPEN, Factors
from kw_lightning.nn.partition import LayerPartition, Shape
from kw_lightning.nn.pooling import pool
from kw_lightning.nn.precision import in_type
from kw_lightning.nn.training import LayerStep, find_step, train
from kw_lightning.nn.warehouse import Warehouse
from kw_lightning.nn.weighing import CellWeights, LearntWeights
from kw_lightning.nn.weight import DynamicWeight, over_rows

NOTHING = Epilogue()


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
        like = torch.empty(()) if self.warehouse is None else self._attached()[0].cells
        return DynamicWeight(self.name or type(self).__name__, self.kernel_shape, like)

    @weight.setter
    def weight(self, weight: object) -> None:
        if not isinstance(weight, DynamicWeight) or weight.shape != self.kernel_shape:
            found = type(weight).__name__
            raise TypeError(f"a dynamic layer takes no weight; load_kernel(kernel) starts from one: found {found}")
        if weight.scale is not None:
            before = 1 if self.output_scale is None else self.output_scale
            self.output_scale = before * weight.scale

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as torch.nn.utils.prune does with what it prunes, which cannot be the weight."""
        if isinstance(param, DynamicWeight):
            raise param.without_parameter()
        super().register_parameter(name, param)

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
        warehouse.serve(self)
        self.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for module in () if self.warehouse is None else self.warehouse.modules():
            if isinstance(module, Warehouse):
                module.serve(self)

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

    def attend(self, x: Tensor, called: Warehouse | None = None) -> Tensor:
        """Return α [batch, mixtures, cells] for the layer's input.

        Args:
            x: the layer's input.
            called: the warehouse that was called; None if the layer's own was not.
        """
        _, weights, _ = self._attend(x, called, alpha=True)
        return weights.alpha() if isinstance(weights, AttentionFactors) else weights

    def _attend(
        self, x: Tensor, called: Warehouse | None = None, *, alpha: bool = False
    ) -> tuple[Tensor, Tensor | AttentionFactors, Factors]:
        """Return x to go on with, α, or its factors where they serve as well, and the factors of the channels.

        Args:
            called: the warehouse that was called; None: the layer's own was not.
            alpha: α itself is wanted.
        """
        warehouse, _, attention = self._attached(called)
        if not isinstance(attention, ContrastingAttention):
            return x, attention(x, *warehouse.temperatures), OPEN
        by_factors = not alpha and not needs_alpha(self.engine) and self.factors_width(x.shape[0]) is not None
        if attention.gates is None and not by_factors:
            return x, attention(x, *warehouse.temperatures), OPEN
        x, means = pool(x, channels_last=self.channels_last)
        hidden = attention.hidden(x, means)
        gates = OPEN if attention.gates is None else attention.gates(hidden, *warehouse.temperatures)
        if by_factors:
            return x, attention.factors(hidden, warehouse.temperature), gates
        return x, attention(x, *warehouse.temperatures, hidden=hidden), gates

    def factors_width(self, batch: int) -> int | None:
        """Return the width of the factors that the engine gets for a batch, None where it gets α."""
        attention, partition = self.attention, self.partition
        if not isinstance(attention, ContrastingAttention) or partition is None:
            return None
        along_rank = attention.low_rank is not None and work.mixes_along_rank(self.engine, self._convolution())
        return attention.factors_width(batch, math.prod(partition.cell_shape), along_rank=along_rank)

    def as_map(self, x: Tensor) -> Tensor:
        """Return the layer's input as [batch, in_channels, *size]."""
        return x

    def evaluation(self, x: Tensor, epilogue: Epilogue = NOTHING) -> Evaluation | None:
        """Return the layer's whole call for a map in plain evaluation, None elsewhere.

        Args:
            x: [batch, in_channels, *size], **or** what the layer refuses.
            epilogue: what becomes of the output, without the layer's own scale and bias.
        """
        if not self._is_own:
            return None
        return find_call(self, x, epilogue) if epilogue is not NOTHING or evaluates(self.engine, x) else None

    def call(self, x: Tensor) -> Evaluation | LayerStep | None:
        """Return the layer's whole call for a map, to be timed; None where it is computed in steps."""
        return find_step(self, x) if torch.is_grad_enabled() else self.evaluation(x)

    def _at_once(self, x: Tensor, epilogue: Epilogue = NOTHING) -> Tensor | None:
        """Return what becomes of the layer's output for a map where that is one call; arguments as of `evaluation`."""
        if torch.compiler.is_compiling() or not self._is_own:
            return None
        if torch.is_grad_enabled():
            y = train(self, x) if epilogue is NOTHING else None
            return None if y is None else self._finish(y, y.dim() - 1)
        call = self.evaluation(x, epilogue)
        return None if call is None else call.run(x, epilogue.added)

    @property
    def _is_own(self) -> bool:
        """Return whether the layer's class is one of this package's, whose calls are known."""
        return False

    @property
    def _geometry(self) -> tuple[Any, ...]:
        """Return all that the convolution depends on beside the cells."""
        raise NotImplementedError

    def _takes(self, x: Tensor) -> bool:
        """Return whether a map is the layer's, as it is."""
        raise NotImplementedError

    def _over_positions(self) -> Convolution:
        """Return what the layer is to a map."""
        return self._convolution()

    def _one_kernel(self, alpha: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the kernel [*kernel_shape] that α [1, mixtures, cells] mixes for all samples."""
        return in_type(assemble_kernels(in_type(alpha, cells.dtype), cells, self._convolution())[0], dtype)

    @property
    def _attention_channels(self) -> int:
        raise NotImplementedError

    def _convolution(self) -> Convolution:
        raise NotImplementedError

    @property
    def _called(self) -> nn.Module | None:
        """Return what the layer calls to compute with the cells, see `Warehouse.called`; None: nothing."""
        warehouse = vars(self).get("warehouse") or self._modules.get("warehouse")  # past `nn.Module.__getattr__`
        return warehouse.called if isinstance(warehouse, Warehouse) else warehouse

    @property
    def given_warehouse(self) -> Warehouse | None:
        """Return the warehouse that the layer was given, whatever stands in its place now; None where it has none."""
        modules = () if self.warehouse is None else self.warehouse.modules()
        return next((module for module in modules if isinstance(module, Warehouse)), None)

    def _attached(self, called: Warehouse | None = None) -> tuple[Warehouse, LayerPartition, CellWeights]:
        """Return the warehouse, the one that was called if any, the layer's place in it and its attention."""
        if self.warehouse is None or self.partition is None or self.attention is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no warehouse yet: "
                "make one for it with kw_lightning.nn.share_warehouse([layer, ...])"
            )
        warehouse = called or self.warehouse
        if not isinstance(warehouse, Warehouse):
            warehouse = self.given_warehouse
            assert warehouse is not None
        return warehouse, self.partition, self.attention

    def _traced(self, x: Any, tracer: Any) -> Any:
        """Return the layer's output to torch.fx, for which it is a leaf as torch's own layers are.

        Of a constant x, as the table of a relative position bias is, it is the cells that are known by their proxy.
        """
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no TorchScript: use torch.export.export(network, (example,)); files of "
            "torch.jit.trace(network, example) need kw_lightning where they are loaded, those of kw export do not"
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


def gated(x: Tensor, factors: Tensor | None, dimensions: int) -> Tensor:
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
