"""From z, a number for every cell, to the weights α of a layer's mixtures; and z that no sample changes.

Paper: KernelWarehouse (ICML 2024), section 3.3, equations 3 and 4. https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kw_lightning.nn.partition import LayerPartition, Start
from kw_lightning.nn.precision import in_type

SMALLEST_SIZE = 1e-3  # added to Σ|z|, as published
LARGEST_SUM = 1 / (1 + SMALLEST_SIZE)  # of |α| over a mixture's cells where Σ|z| = 1


class CellWeights(nn.Module):
    """Turns z [..., mixtures, cells + 1] into α [..., mixtures, cells], wherever z comes from.

    With temperature τ, α_ij = τ·β_ij + (1 − τ) · z_ij / (Σ_p |z_ip| + 1e-3), where p also runs over the zero cell.
    Without a start (`start="none"`) there is no β, and τ has no effect: α_ij = z_ij / (Σ_p |z_ip| + 1e-3).

    Args:
        partition: the layer's place in its warehouse.
        start: "none" for weights without β; "own" and "shared" differ in the partition.

    Attributes:
        dynamic: whether every sample has weights of its own.
        annealed: whether the weights start at β.
        start: β [mixtures, cells].
    """

    dynamic = True
    start: Tensor

    def __init__(self, partition: LayerPartition, start: Start = "own") -> None:
        super().__init__()
        self.mixtures, self.cells, self.first_cell = partition.mixtures, partition.cells, partition.first_cell
        self.initial_cells = partition.initial_cells
        self.annealed = start != "none"

    @property
    def columns(self) -> int:
        """Return how many numbers z has for a mixture: the cells and the zero cell."""
        return self.cells + 1

    @property
    def published(self) -> bool:
        """Return whether the authors' code has this attention, the start apart, which no checkpoint holds."""
        return self.dynamic

    @torch.no_grad()
    def start_from(self, weights: Tensor) -> None:
        """Start z so that at τ = 0 every sample gets the same weights.

        The zero cell takes what the weights leave of Σ|z| = 1.

        Args:
            weights: α [mixtures, cells] at the start, with Σ_j |α_ij| ≤ `LARGEST_SUM`.
        """
        z = weights / LARGEST_SUM
        self._start_z(torch.cat([z, 1 - z.abs().sum(dim=-1, keepdim=True)], dim=-1))

    def weigh(self, z: Tensor, temperature: Tensor) -> Tensor:
        """Return α [..., mixtures, cells] of z [..., mixtures, columns] at a temperature τ, a scalar tensor."""
        # Small maps leave a layer little else to do than this: few operations, each on all mixtures.
        size = torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True)
        if not self.annealed:
            return z[..., :-1] / (size + SMALLEST_SIZE)
        scale = in_type(1 - temperature, z.dtype) / (size + SMALLEST_SIZE)
        # The published code keeps β in float32; τβ is rounded alike, else its numbers hold to 1e-8 only.
        start = self._start_on(z.device) * in_type(temperature, torch.float32)
        return torch.addcmul(in_type(start, z.dtype), z[..., :-1], scale)

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

    def _make_start(self, device: torch.device) -> Tensor:
        """Return β [mixtures, cells]: the cell that each mixture starts as."""
        with torch.inference_mode(False):  # it outlives the call that makes it
            initial = torch.tensor(self.initial_cells, device=device)
            return (torch.arange(self.cells, device=device) == initial.unsqueeze(-1)).to(torch.float32)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self._start_on(self._device)
        return self

    def extra_repr(self) -> str:
        return f"mixtures={self.mixtures}, cells={self.cells}" + ("" if self.annealed else ", start='none'")


class LearntWeights(CellWeights):
    """Weights that are learnt as they are: one kernel for all samples, mixed once a step.

    What is left of the method is the sharing of cells. z is drawn as the last layer of an attention is.

    Args:
        partition: the layer's place in its warehouse.
        start: see `CellWeights`.
    """

    dynamic = False

    def __init__(
        self,
        partition: LayerPartition,
        *,
        start: Start = "own",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(partition, start)
        factory: Any = {"device": device, "dtype": dtype}
        self.z = nn.Parameter(torch.empty(self.mixtures, self.columns, **factory))
        self.start = self._make_start(self.z.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw z: Kaiming normal over a mixture's columns, std = sqrt(2 / columns)."""
        nn.init.kaiming_normal_(self.z, nonlinearity="relu")

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        """Return α [1, mixtures, cells], whatever x is, in float32 or more."""
        return self.weigh(in_type(self.z, torch.promote_types(self.z.dtype, torch.float32)), temperature).unsqueeze(0)

    def _start_z(self, z: Tensor) -> None:
        self.z.copy_(z)


__all__ = ["LARGEST_SUM", "CellWeights", "LearntWeights"]
