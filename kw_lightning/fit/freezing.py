"""Layers that stay as they are: for the whole run, or until the rest of the network has learnt to use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from kw_lightning.fit.groups import layers_meant, meant


class Freezing(Callback):
    """Keeps layers as they are: no gradients, and evaluation mode, so that statistics and dropout stand still too.

    A pure function of the epoch, so that a resumed run goes on as it was. Gradients are dropped before the step, before
    they are clipped, rather than not computed: what a strategy brings together from several devices stays the same when
    the layers thaw.

    Args:
        layers: names or globs of layers of the network.
        epochs: how long; None is the whole run.
    """

    def __init__(self, layers: Sequence[str], epochs: int | None) -> None:
        self.layers = tuple(layers)
        self.epochs = epochs
        self._modules: list[nn.Module] = []
        self._parameters: set[nn.Parameter] = set()
        self._frozen = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        network: Any = pl_module.network
        self._modules, self._parameters = layers_meant(network, self.layers), meant(network, self.layers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the layers in evaluation mode while they are frozen, back in training mode when they thaw."""
        frozen = self._is_frozen(trainer)
        for module in self._modules if frozen or self._frozen else ():
            module.training = not frozen
        self._frozen = frozen

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of frozen layers."""
        for parameter in self._parameters if self._is_frozen(trainer) else ():
            parameter.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the layers in the mode of the rest."""
        for module in self._modules:
            module.training = pl_module.training
        self._frozen = False

    def _is_frozen(self, trainer: Trainer) -> bool:
        return self.epochs is None or trainer.current_epoch < self.epochs
