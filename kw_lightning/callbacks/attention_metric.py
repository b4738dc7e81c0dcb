"""What a warehouse's attention does over a data set, as a metric that several processes add up.

Paper: KernelWarehouse (ICML 2024), figure 3 (mean attention of a warehouse) and section 3.3 (negative weights).
https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

DEAD = 0.01  # a cell is dead when it is used less than this part of the average cell


@dataclass(frozen=True)
class AttentionSummary:
    """The attention of one warehouse over a pass.

    Attributes:
        mean: the mean of α over the samples, [m_t, n]; the layers' mixtures below each other.
        negative_share: the part of all weights that is under 0; NaN where there are none.
        entropy: of |α| over the cells, normalised per mixture; mean over mixtures and samples, in nats.
        effective_cells: exp of the entropy of the cells' use, u_j = Σ_i mean |α_ij|: n when all are used alike.
        dead_cells: how many cells are used less than a hundredth of the average.
        similarity: mean cosine between the α of two different samples, mean over the layers: 1 is a static network.
    """

    mean: Tensor
    negative_share: float
    entropy: float
    effective_cells: float
    dead_cells: int
    similarity: float

    def scalars(self) -> dict[str, float]:
        """Return all but the matrix, by name."""
        return {name: value for name, value in asdict(self).items() if name != "mean"}


class AttentionMetric(Metric):
    """Adds up the attention of the layers of one warehouse.

    Every state is a sum over samples, so the states of several processes add up to those of one.

    Args:
        mixtures: m of each layer, in the warehouse's order.
        cells: n.

    Example:
        >>> metric = AttentionMetric([2], cells=3)
        >>> metric.update(0, torch.eye(3)[:2].expand(4, 2, 3))
        >>> metric.summary().dead_cells
        1
    """

    full_state_update = False
    is_differentiable = False

    attention: Tensor
    magnitude: Tensor
    direction: Tensor
    entropy: Tensor
    negatives: Tensor
    samples: Tensor

    def __init__(self, mixtures: Sequence[int], cells: int) -> None:
        super().__init__()
        self.mixtures, self.cells = tuple(mixtures), cells
        rows = sum(mixtures)
        for name in ("attention", "magnitude", "direction"):
            self.add_state(name, torch.zeros(rows, cells), dist_reduce_fx="sum")
        self.add_state("entropy", torch.zeros(rows), dist_reduce_fx="sum")
        self.add_state("negatives", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(len(self.mixtures), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, layer: int, attention: Tensor) -> None:
        """Add the attention of one layer to one batch.

        Args:
            layer: the layer's place in `mixtures`.
            attention: α, [batch, m, n].
        """
        first = sum(self.mixtures[:layer])
        rows = slice(first, first + self.mixtures[layer])
        attention = attention.detach().float()
        magnitude = attention.abs()  # [batch, m, n]
        mass = magnitude.sum(dim=-1)  # [batch, m]
        lengths = torch.linalg.vector_norm(attention, dim=(1, 2))  # [batch]
        weights = torch.stack([torch.ones_like(lengths), torch.where(lengths > 0, 1 / lengths, 0)])
        total, direction = (weights @ attention.flatten(1)).view(2, -1, self.cells)
        # H(|α| / s) = log s + Σ −|α| log |α| / s; a mixture of the zero cell alone has s = 0 and no entropy.
        safe = torch.where(mass > 0, mass, 1)
        entropy = safe.log() + torch.special.entr(magnitude).sum(dim=-1) / safe
        self.attention[rows] += total
        self.magnitude[rows] += magnitude.sum(dim=0)
        self.direction[rows] += direction
        self.entropy[rows] += entropy.sum(dim=0)
        self.negatives += (attention < 0).sum()
        self.samples[layer] += len(attention)

    def compute(self) -> dict[str, Tensor]:
        """Return the fields of `AttentionSummary` as tensors, over everything added by all processes."""
        samples = self.samples.double()
        heard = samples.repeat_interleave(torch.tensor(self.mixtures, device=samples.device))
        per_row = heard.clamp_min(1)
        use = (self.magnitude.double() / per_row.unsqueeze(1)).sum(dim=0)  # [n]
        return {
            "mean": self.attention / per_row.unsqueeze(1),
            "negative_share": self.negatives / (heard.sum() * self.cells),
            "entropy": (self.entropy / per_row)[heard > 0].mean(),
            "effective_cells": torch.special.entr(use / use.sum()).sum().exp(),
            "dead_cells": (use < DEAD * use.mean()).sum(),
            "similarity": self.similarities().nanmean(),
        }

    def similarities(self) -> Tensor:  # [layers]
        """Return the mean cosine between two samples' α by layer, over what this process added; 0 / 0 under two."""
        samples = self.samples.double()
        squares = self.direction.double().square().sum(dim=1).split(self.mixtures)
        return (torch.stack([square.sum() for square in squares]) - samples) / (samples * (samples - 1))

    def summary(self) -> AttentionSummary:
        """Return `compute` as plain numbers; in every process at once."""
        values = self.compute()
        return AttentionSummary(
            mean=values["mean"].float().cpu().view(-1, self.cells),
            negative_share=float(values["negative_share"]),
            entropy=float(values["entropy"]),
            effective_cells=float(values["effective_cells"]),
            dead_cells=int(values["dead_cells"]),
            similarity=float(values["similarity"]),
        )
