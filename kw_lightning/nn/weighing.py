"""From z, a number for every cell, to the weights α of a layer's mixtures; and z that no sample changes.

Paper: KernelWarehouse (ICML 2024), section 3.3, equations 3 and 4, and the ablation of attention functions.
https://arxiv.org/abs/2406.07879. Softmax with a temperature: DY-Conv (CVPR 2020), https://arxiv.org/abs/1912.03458;
sigmoid: CondConv (NeurIPS 2019), https://arxiv.org/abs/1904.04971.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kw_lightning.errors import mistake
from kw_lightning.nn.gates import ChannelGates
from kw_lightning.nn.partition import LayerPartition, Start
from kw_lightning.nn.precision import in_type, is_recorded

Function = Literal["contrast", "softmax", "sigmoid", "relu"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
SMALLEST_SIZE = 1e-3  # added to Σ|z|, as published
LARGEST_SUM = 1 / (1 + SMALLEST_SIZE)  # of |α| over a mixture's cells where Σ|z| = 1


@dataclass(frozen=True)
class SoftmaxAnnealing:
    """How the softmax's temperature T falls: linearly from `start` to `end`; without `epochs` in a tenth of the run."""

    start: float = 30.0
    end: float = 1.0
    epochs: float | None = None


class CellWeights(nn.Module):
    """Turns z [..., mixtures, columns] into α [..., mixtures, cells], wherever z comes from.

    With temperature τ, α_ij = τ·β_ij + (1 − τ) · f(z_i)_j; without a start (`start="none"`) there is no β, and τ has no
    effect: α_ij = f(z_i)_j. The function f is one of

    - contrast: z_j / (Σ_p |z_p| + 1e-3), where p also runs over the zero cell, whose column is then dropped: without it
      the absolute weights of the cells would always add up to 1;
    - softmax: exp(z_j / T) / Σ_p exp(z_p / T), with a temperature T of its own;
    - sigmoid: 1 / (1 + exp(−z_j)), every cell by itself;
    - relu: max(z_j, 0) / (Σ_p |z_p| + 1e-3): contrast without negative weights; a negative z_j enlarges the sum alone,
      as that of the zero cell does.

    Args:
        partition: the layer's place in its warehouse.
        start: "none" for weights without β; "own" and "shared" differ in the partition.
        function: f.

    Raises:
        ValueError: no such function.

    Attributes:
        dynamic: whether every sample has weights of its own.
        gates: of the layer's channels; None without.
        annealed: whether the weights start at β.
        start: β [mixtures, cells].
    """

    dynamic = True
    gates: ChannelGates | None
    start: Tensor

    def __init__(self, partition: LayerPartition, start: Start = "own", function: Function = "contrast") -> None:
        super().__init__()
        if function not in FUNCTIONS:
            raise ValueError(mistake(function, FUNCTIONS, what="the unknown function"))
        self.mixtures, self.cells, self.first_cell = partition.mixtures, partition.cells, partition.first_cell
        self.initial_cells = partition.initial_cells
        self.annealed, self.function = start != "none", function
        self.gates = None
        self._initial: Tensor | None = None

    @property
    def columns(self) -> int:
        """Return how many numbers z has for a mixture: one for each cell, and for the zero cell where there is one."""
        return columns(self.cells, self.function)

    @property
    def published(self) -> bool:
        """Return whether the authors' code has this attention, the start apart, which no checkpoint holds."""
        return self.dynamic and self.function == "contrast" and self.gates is None

    @torch.no_grad()
    def start_from(self, weights: Tensor) -> None:
        """Start z so that at τ = 0 every sample gets the same weights.

        The zero cell takes what the weights leave of Σ|z| = 1.

        Args:
            weights: α [mixtures, cells] at the start, with Σ_j |α_ij| ≤ `LARGEST_SUM`.

        Raises:
            ValueError: another function than contrast, which gives no negative weights.
        """
        if self.function != "contrast":
            raise ValueError(mistake(self.function, "contrast, which alone gives any weights", what="the function"))
        z = weights / LARGEST_SUM
        self._start_z(torch.cat([z, 1 - z.abs().sum(dim=-1, keepdim=True)], dim=-1))

    def weigh(self, z: Tensor, temperature: Tensor, softmax_temperature: Tensor | None = None) -> Tensor:
        """Return α [..., mixtures, cells] of z [..., mixtures, columns].

        Args:
            z: what the cells are weighed by.
            temperature: τ, a scalar tensor.
            softmax_temperature: T, a scalar tensor; None means 1.
        """
        # Small maps leave a layer little else to do than this: few operations, each on all mixtures.
        numbers, size = self._fractions(z, softmax_temperature)
        if not self.annealed:
            return numbers if size is None else numbers / size
        rest = in_type(1 - temperature, z.dtype)
        # The published code keeps β in float32; τβ is rounded alike, else its numbers hold to 1e-8 only.
        start = self._start_on(z.device) * in_type(temperature, torch.float32)
        return torch.addcmul(in_type(start, z.dtype), numbers, rest if size is None else rest / size)

    def _fractions(self, z: Tensor, softmax_temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return f(z) [..., mixtures, cells] as numbers and a divisor [..., mixtures, 1] of them, None for 1."""
        if self.function == "softmax":
            softened = z if softmax_temperature is None else z / in_type(softmax_temperature, z.dtype)
            return torch.softmax(softened, dim=-1), None
        if self.function == "sigmoid":
            return torch.sigmoid(z), None
        # As a norm it is an operator of ONNX whose shape onnxruntime's tools for quantization do not know.
        norm = z.abs().sum(-1, keepdim=True) if is_recorded() else torch.linalg.vector_norm(z, 1, -1, keepdim=True)
        size = norm + SMALLEST_SIZE
        return (torch.relu(z) if self.function == "relu" else z[..., :-1]), size

    def reset_parameters(self) -> None:
        """Set the start values of what gives z."""
        raise NotImplementedError

    def _start_z(self, z: Tensor) -> None:
        """Make z [mixtures, columns] what every sample gets."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _start_on(self, device: torch.device) -> Tensor:
        """Return β on a device: weights may have come there without `_apply`, by assignment for one."""
        if self.start.device == device:
            return self.start
        start = self._make_start(device)
        # What a transform of torch.func or a mode of imaginary tensors makes is not for other calls.
        if type(start) is Tensor and not torch._C._are_functorch_transforms_active():
            self.start = start
        return start

    def _initial_on(self, device: torch.device) -> Tensor:
        """Return β as the cell that each mixture starts as, [mixtures], on a device; the number of cells for none."""
        found = self._initial
        if found is not None and found.device == device:
            return found
        with torch.inference_mode(False):
            found = torch.tensor(self.initial_cells, device=device)
        if type(found) is Tensor and not torch._C._are_functorch_transforms_active():
            self._initial = found
        return found

    def _make_start(self, device: torch.device) -> Tensor:
        """Return β [mixtures, cells]: the cell that each mixture starts as."""
        with torch.inference_mode(False):  # it outlives the call that makes it
            initial = torch.tensor(self.initial_cells, device=device)
            return (torch.arange(self.cells, device=device) == initial.unsqueeze(-1)).to(torch.float32)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self._start_on(self._device)
        self._initial_on(self._device)
        return self

    def extra_repr(self) -> str:
        text = f"mixtures={self.mixtures}, cells={self.cells}" + ("" if self.annealed else ", start='none'")
        return text + ("" if self.function == "contrast" else f", function={self.function!r}")


def columns(cells: int, function: Function) -> int:
    """Return how many numbers a mixture of so many cells is weighed by."""
    return cells + 1 if function == "contrast" else cells


class LearntWeights(CellWeights):
    """Weights that are learnt as they are: one kernel for all samples, mixed once a step.

    What is left of the method is the sharing of cells. z is drawn as the last layer of an attention is.

    Args:
        partition: the layer's place in its warehouse.
        start, function: see `CellWeights`.
    """

    dynamic = False

    def __init__(
        self,
        partition: LayerPartition,
        *,
        start: Start = "own",
        function: Function = "contrast",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(partition, start, function)
        factory: Any = {"device": device, "dtype": dtype}
        self.z = nn.Parameter(torch.empty(self.mixtures, self.columns, **factory))
        self.start = self._make_start(self.z.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw z: Kaiming normal over a mixture's columns, std = sqrt(2 / columns)."""
        nn.init.kaiming_normal_(self.z, nonlinearity="relu")

    def forward(self, x: Tensor, temperature: Tensor, softmax_temperature: Tensor | None = None) -> Tensor:
        """Return α [1, mixtures, cells], whatever x is, in float32 or more; see `CellWeights.weigh`."""
        z = in_type(self.z, torch.promote_types(self.z.dtype, torch.float32))
        return self.weigh(z, temperature, softmax_temperature).unsqueeze(0)

    def _start_z(self, z: Tensor) -> None:
        self.z.copy_(z)


__all__ = ["FUNCTIONS", "LARGEST_SUM", "CellWeights", "Function", "LearntWeights", "SoftmaxAnnealing", "columns"]
