"""The callbacks that a recipe's own sections ask for, whoever trains the network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kw_lightning.callbacks.attention import AttentionStatistics
from kw_lightning.callbacks.temperature import TemperatureAnnealing
from kw_lightning.recipe.types import Recipe


class MethodCallbacks(NamedTuple):
    """What a network with warehouses is trained with.

    Attributes:
        temperature: the annealing of section `temperature`.
        attention: the statistics of `log: {attention: …}`; None when the recipe logs none.
    """

    temperature: TemperatureAnnealing
    attention: AttentionStatistics | None


def method_callbacks(
    recipe: Recipe, module: str | None = None, folder: Path | None = None, *, warm_start: bool = False
) -> MethodCallbacks:
    """Return the callbacks of a recipe with warehouses.

    Args:
        recipe: the recipe.
        module: path of the submodule that it is for; None means the whole LightningModule.
        folder: where the statistics' matrices go; `attention` in the run's folder of the first logger by default.
        warm_start: whether the network starts from static kernels.
    """
    annealing, log = recipe.temperature, recipe.log
    temperature = TemperatureAnnealing(
        annealing.start, annealing.end, annealing.epochs, annealing.steps, annealing.shape, module, warm_start
    )
    if not log.attention_every_n_epochs:
        return MethodCallbacks(temperature, None)
    attention = AttentionStatistics(log.attention_every_n_epochs, log.attention_figures, folder, module)
    return MethodCallbacks(temperature, attention)
