"""What a network's attention does over a pass, in detail: by layer, by class, and how its weights are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.callbacks.attention_metric import DEAD, AttentionMetric, AttentionSummary
from kw_lightning.callbacks.layout import layers_of_warehouses, shares_of
from kw_lightning.nn.partition import LayerPartition

Array = np.ndarray[Any, np.dtype[Any]]

_POSITIVE = np.logspace(-4, 0, 33)
EDGES = np.concatenate([-_POSITIVE[::-1], _POSITIVE])
"""Edges of the histogram of α, by powers of ten on both sides of 0: most weights are near one part of the cells."""
COUNTED = 1 << 18
"""Weights of a batch and layer that the histogram counts at the most: those of its first images."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer over a pass.

    Attributes:
        name: of the layer.
        share: its share of the warehouse.
        negative_share: the part of its weights that is under 0.
        used_cells: cells that it uses at least a hundredth as much as its average cell.
        variation: 1 less the mean cosine between the α of two samples: 0 is a static layer. None of a single sample.
    """

    name: str
    share: LayerPartition
    negative_share: float
    used_cells: int
    variation: float | None


@dataclass(frozen=True)
class WarehouseAttention:
    """The attention of one warehouse over a pass.

    Attributes:
        name: of the warehouse.
        summary: mean α [m_t, n] and its figures.
        layers: in the warehouse's order.
        histogram: how many weights are between two `EDGES`; the one at their middle is those about 0. None where only
            the mean is known.
        class_use: how much the images of each class use each cell, Σ_i mean |α_ij|, [classes, n], up to the last class
            with images; rows of classes without images are 0. None where images have no classes.
    """

    name: str
    summary: AttentionSummary
    layers: tuple[LayerAttention, ...]
    histogram: Array | None = None
    class_use: Array | None = None

    @property
    def shares(self) -> dict[str, LayerPartition]:
        """Return each layer's share of the warehouse, by name."""
        return {layer.name: layer.share for layer in self.layers}

    def arrays(self) -> dict[str, Array]:
        """Return all of it as arrays by name; `layers`, `mixtures` and `layer_…` have a value a layer."""
        shares = self.shares.values()
        found = {
            "mean": self.summary.mean.numpy(),
            **{name: np.array(value) for name, value in self.summary.scalars().items()},
            "initial_cells": np.array([cell for share in shares for cell in share.initial_cells]),
            "layers": np.array([layer.name for layer in self.layers]),
            "mixtures": np.array([share.mixtures for share in shares]),
            "layer_negative_share": np.array([layer.negative_share for layer in self.layers]),
            "layer_used_cells": np.array([layer.used_cells for layer in self.layers]),
            "layer_variation": np.array([layer.variation for layer in self.layers], dtype=float),
        }
        if self.histogram is not None:
            found |= {"histogram": self.histogram, "histogram_edges": EDGES}
        return found if self.class_use is None else {**found, "class_use": self.class_use}


class DetailedMetric(AttentionMetric):
    """`AttentionMetric` that also adds up by layer, by class and by size of the weights.

    Args:
        mixtures: m of each layer, in the warehouse's order.
        cells: n.
    """

    layer_negatives: Tensor
    histogram: Tensor

    def __init__(self, mixtures: Sequence[int], cells: int) -> None:
        super().__init__(mixtures, cells)
        self.add_state("layer_negatives", torch.zeros(len(mixtures), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(len(EDGES) - 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.class_use: Tensor | None = None  # [classes, n]
        self.class_samples: Tensor | None = None  # [classes]

    def update(self, layer: int, attention: Tensor, targets: Tensor | None = None) -> None:
        """Add the attention of one layer to one batch.

        Args:
            layer: the layer's place in `mixtures`.
            attention: α, [batch, m, n]; [1, m, n] where no sample changes it.
            targets: the class of each image, [batch], or of several labels 0 and 1 for each class, [batch, classes].
        """
        super().update(layer, attention)
        attention = attention.detach().float()
        self.layer_negatives[layer] += (attention < 0).sum()
        images = max(COUNTED // max(attention[0].numel(), 1), 1)
        edges = torch.as_tensor(EDGES, dtype=attention.dtype, device=attention.device)
        places = torch.bucketize(attention[:images].reshape(-1).clamp(-1, 1), edges[1:-1])
        self.histogram += torch.bincount(places, minlength=len(EDGES) - 1)
        if targets is not None:
            use = attention.abs().sum(dim=1).expand(len(targets), -1)
            self._add_by_class(use, targets, count=layer == 0)

    def _add_by_class(self, use: Tensor, targets: Tensor, *, count: bool) -> None:
        """Add the use of the cells [batch, n] to that of the images' classes, of which there may be new ones."""
        shares = (targets if targets.ndim == 2 else F.one_hot(targets)).to(use)  # [batch, classes]
        by_class, samples = shares.T @ use, shares.sum(dim=0)
        if self.class_use is None or self.class_samples is None:
            self.class_use, self.class_samples = torch.zeros_like(by_class), torch.zeros_like(samples)
        more = len(by_class) - len(self.class_use)
        by_class, samples = F.pad(by_class, (0, 0, 0, max(-more, 0))), F.pad(samples, (0, max(-more, 0)))
        self.class_use = F.pad(self.class_use, (0, 0, 0, max(more, 0))) + by_class
        if count:
            self.class_samples = F.pad(self.class_samples, (0, max(more, 0))) + samples

    def details(self, name: str, shares: Mapping[str, LayerPartition]) -> WarehouseAttention:
        """Return what was added, of the warehouse's layers by name."""
        samples, cosines = self.samples.clamp_min(1), self.similarities()
        layers = []
        for index, (layer, share) in enumerate(shares.items()):
            first = sum(self.mixtures[:index])
            use = self.magnitude[first : first + share.mixtures].sum(dim=0)
            weights = float(samples[index]) * share.mixtures * self.cells
            cosine = float(cosines[index])
            layers.append(
                LayerAttention(
                    layer,
                    share,
                    float(self.layer_negatives[index]) / weights,
                    int((use >= DEAD * use.mean()).sum()) if float(use.sum()) else 0,
                    max(1 - cosine, 0.0) if np.isfinite(cosine) else None,
                )
            )
        by_class = None
        if self.class_use is not None and self.class_samples is not None:
            by_class = (self.class_use / self.class_samples.clamp_min(1).unsqueeze(1)).cpu().numpy()
        return WarehouseAttention(name, self.summary(), tuple(layers), self.histogram.cpu().numpy(), by_class)


@dataclass
class Listening:
    """Adds up the attention of a network's warehouses from `begin` to `end`.

    Attributes:
        targets: the classes of the batch that runs next, see `DetailedMetric.update`; None where there are none.
        failure: what kept it from adding on; the network runs on.
    """

    targets: Tensor | None = None
    failure: Exception | None = None
    _warehouses: dict[str, tuple[DetailedMetric, dict[str, LayerPartition]]] = field(default_factory=dict)
    _hooks: ExitStack = field(default_factory=ExitStack)

    def begin(self, network: nn.Module) -> None:
        """Listen to a network."""
        for warehouse, layers in layers_of_warehouses(network):
            shares = shares_of(layers)
            if not shares:
                continue
            cells = next(iter(shares.values())).cells
            metric = DetailedMetric([share.mixtures for share in shares.values()], cells)
            self._warehouses[warehouse.name] = metric.to(warehouse.cells.device), shares
            for index, name in enumerate(shares):
                attention = layers[name].attention
                assert attention is not None
                self._hooks.callback(attention.register_forward_hook(partial(self._add, metric, index)).remove)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no new hooks

    def end(self) -> tuple[WarehouseAttention, ...]:
        """Stop listening and return what was heard of each warehouse."""
        found = self._warehouses
        self.stop()
        heard = ((name, metric, shares) for name, (metric, shares) in found.items() if int(metric.samples.sum()))
        return tuple(metric.details(name, shares) for name, metric, shares in heard)

    def stop(self) -> None:
        """Stop listening and forget what was heard."""
        self._hooks.close()
        self._warehouses = {}

    def _add(self, metric: DetailedMetric, layer: int, module: nn.Module, args: Any, attention: Tensor) -> None:
        if self.failure is None:
            try:
                metric.update(layer, attention, self.targets)
            except Exception as error:
                self.failure = error
