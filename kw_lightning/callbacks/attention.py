"""Statistics of the attention over a validation pass: what the warehouses' cells are used for."""

from __future__ import annotations

import math
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from kw_lightning.callbacks.attention_metric import AttentionMetric, AttentionSummary
from kw_lightning.callbacks.conversion import submodule
from kw_lightning.callbacks.figures import publish
from kw_lightning.callbacks.heat_map import heat_map
from kw_lightning.callbacks.layout import layers_of_warehouses, shares_of
from kw_lightning.errors import mistake
from kw_lightning.nn.partition import LayerPartition
from kw_lightning.paths import whole


class AttentionStatistics(Callback):
    """Summarises the attention of every warehouse over a validation pass.

    Per warehouse it logs `attention/NAME/…`: `negative_share`, `entropy`, `effective_cells`, `dead_cells` and
    `similarity` (see `AttentionSummary`), and writes the mean attention matrices [m_t, n], the paper's figure 3, to
    `attention/epoch=…-step=….npz` in the run's folder; with `figures` also as heat maps to
    TensorBoard, Weights & Biases and MLflow, whose loggers are in use.

    It listens by forward hooks on the layers' attentions during the passes it summarises and at no other time; a
    compiled network runs uncompiled in those passes, because compiled code does not call new hooks. Several processes
    add up their sums. The sanity check is left out, and with `fast_dev_run` no file is written. Warehouses whose layers
    a pass does not use, as a discriminator's, have no summary of it.

    Where a Trainer has statistics of several submodules, they are told apart by its path: `attention/MODULE/NAME/…` and
    `attention/MODULE/epoch=…-step=….npz`.

    Args:
        every_n_epochs: summarise the validation passes of every n-th epoch; 0 means only those of `trainer.validate`.
        figures: draw heat maps for the loggers that show pictures.
        folder: where the matrices go; `attention` in the run's folder of the first logger by default.
        module: path of the submodule whose warehouses are meant; the whole LightningModule by default.

    Attributes:
        latest: the summaries of the last pass by warehouse.

    Raises:
        ValueError: `every_n_epochs` is negative.

    Example:
        >>> trainer = Trainer(callbacks=[AttentionStatistics(every_n_epochs=5, figures=True)])
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        figures: bool = False,
        folder: str | os.PathLike[str] | None = None,
        module: str | None = None,
    ) -> None:
        if every_n_epochs < 0:
            raise ValueError(mistake(every_n_epochs, "a whole number of at least 0", what="every_n_epochs"))
        self.every_n_epochs, self.figures, self.folder, self.module = every_n_epochs, figures, folder, module
        self.latest: dict[str, AttentionSummary] = {}
        self._metrics: dict[str, AttentionMetric] = {}
        self._layers: dict[str, dict[str, LayerPartition]] = {}
        self._listening = ExitStack()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the attentions, when this pass is to be summarised."""
        self._listening.close()
        if self._is_due(trainer):
            self.listen(submodule(pl_module, self.module or None))
            if not self._metrics:
                rank_zero_warn(
                    "AttentionStatistics found no warehouse in the network, and nothing to summarise: convert it "
                    'first, with kw_lightning.convert(network, recipe) or KWCallback("recipe.yaml")'
                )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening, add up the processes' sums, log and write."""
        if not self._metrics:
            return
        self.latest = self.summaries()
        place = "/".join(["attention", *self._told_apart_by(trainer)])
        for name, summary in self.latest.items():
            numbers = {f"{place}/{name}/{key}": value for key, value in summary.scalars().items()}
            if not trainer.barebones:
                pl_module.log_dict(numbers, sync_dist=True)  # equal in all processes; Lightning warns without
        folder = Path(self.folder or _run_folder(trainer) / place)
        if self.latest and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(folder / f"epoch={trainer.current_epoch:04d}-step={trainer.global_step}.npz")
        if self.figures:
            self._draw(trainer, place)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the last pass's numbers; its matrices are in the run's folder."""
        return {"latest": {name: summary.scalars() for name, summary in self.latest.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the last pass's numbers, with empty matrices."""
        empty = torch.empty(0, 0)
        self.latest = {name: AttentionSummary(mean=empty, **numbers) for name, numbers in state_dict["latest"].items()}

    def listen(self, network: nn.Module) -> None:
        """Start to add up the attention of a network's warehouses; for loops without a Trainer."""
        self._stop()
        for warehouse, layers in layers_of_warehouses(network):
            attentions = [layer.attention for layer in layers.values() if layer.attention is not None]
            metric = AttentionMetric([attention.mixtures for attention in attentions], attentions[0].cells)
            # Two networks inside one LightningModule may have warehouses of one name.
            name = warehouse.name if warehouse.name not in self._metrics else f"{next(iter(layers))}:{warehouse.name}"
            self._metrics[name] = metric.to(warehouse.cells.device)
            self._layers[name] = shares_of(layers)
            for index, attention in enumerate(attentions):
                handle = attention.register_forward_hook(_Add(self._metrics[name], index))
                self._listening.callback(handle.remove)
        self._listening.enter_context(_UNCOMPILED)

    def summaries(self) -> dict[str, AttentionSummary]:
        """Stop listening and return the summaries of the warehouses that were in use; in every process at once."""
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The ``compute`` method of metric AttentionMetric was called before"
            )
            summaries = {name: metric.summary() for name, metric in self._metrics.items()}
        self._stop()
        return {name: summary for name, summary in summaries.items() if not math.isnan(summary.negative_share)}

    def _stop(self) -> None:
        self._listening.close()
        self._metrics = {}

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn == "validate":
            return True
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _told_apart_by(self, trainer: Trainer) -> list[str]:
        """Return the path of the submodule, where there are statistics of others beside it."""
        found = [getattr(callback, "attention", callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        modules = {callback.module for callback in found if isinstance(callback, AttentionStatistics)}
        return [self.module] if self.module and len(modules) > 1 else []

    @rank_zero_only
    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: summary.mean.numpy() for name, summary in self.latest.items()}
        arrays |= {f"{name}/layers": np.array(list(self._layers[name])) for name in self.latest}
        with whole(path) as partial:
            np.savez_compressed(partial, **arrays)

    @rank_zero_only
    def _draw(self, trainer: Trainer, place: str) -> None:
        maps = {f"{place}/{name}": heat_map(found.mean, self._layers[name]) for name, found in self.latest.items()}
        publish(trainer.loggers, maps, trainer.global_step)


def _run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run alone, beside its checkpoints; every process has to ask, as the first one decides.

    Lightning's `trainer.log_dir` is one folder for all runs of a logger that keeps no files of its own.
    """
    logger, folder = trainer.logger, None
    if logger is not None:
        own = [str(part) for part in (logger.name, logger.version) if part is not None]
        folder = logger.log_dir or Path(logger.save_dir or trainer.default_root_dir, *own)
    return Path(trainer.strategy.broadcast(folder or trainer.default_root_dir))


class _Add:
    """The forward hook of one attention; a class because a closure in a loop would see the last layer alone."""

    def __init__(self, metric: AttentionMetric, layer: int) -> None:
        self.metric, self.layer = metric, layer

    def __call__(self, module: nn.Module, args: Any, attention: Tensor) -> None:
        self.metric.update(self.layer, attention)


class _Uncompiled:
    """Runs compiled networks uncompiled while anyone listens; torch's own blocks have to be nested."""

    def __init__(self) -> None:
        self._listeners = 0

    def __enter__(self) -> None:
        if not self._listeners:
            self._stance = torch.compiler.set_stance("force_eager")
        self._listeners += 1

    def __exit__(self, *_: object) -> None:
        self._listeners -= 1
        if not self._listeners:
            self._stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()
