"""KWCallback: KernelWarehouse in an existing LightningModule, by one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.fsdp import FullyShardedDataParallel

from kw_lightning.callbacks.checkpoint import KEY, class_names_of, describe, refuse_other_weights
from kw_lightning.callbacks.conversion import (
    after_configure_model,
    builds_layers_late,
    callback_recipe,
    make_dynamic,
    submodule,
)
from kw_lightning.callbacks.copies import copies_of, pairs
from kw_lightning.callbacks.layout import dynamic_layers
from kw_lightning.callbacks.method import method_callbacks
from kw_lightning.callbacks.strategies import check_sharding, check_strategy
from kw_lightning.errors import KWError, listed
from kw_lightning.preprocessing import CLASSES


class KWCallback(Callback):
    """Makes the layers of a LightningModule dynamic, anneals their temperature and summarises their attention.

    Layers are swapped before weights are loaded, before the strategy wraps the module and before optimizers are made,
    including layers that `setup` or `configure_model` build. A network that is dynamic already stays as it is. The
    recipe's section `temperature` says how the temperature falls (`TemperatureAnnealing`), and `log: {attention: …}`
    what is summarised (`AttentionStatistics`); its sections `model`, `data` and `train` are ignored.

    Callbacks that copy the network (`EMAWeightAveraging`, `StochasticWeightAveraging`) or look for its weights
    (`ModelPruning`) come after this one. Checkpoints hold the recipe, and
    `kw_lightning.callbacks.load_from_checkpoint` loads the module without a Trainer.

    Args:
        recipe: a path, the name of a shipped recipe, or the recipe as plain data; its layers' names are relative to
            the LightningModule, or to `module`.
        module: path of a submodule that the recipe is for. Copies of it in the LightningModule, as momentum encoders
            are made by `copy.deepcopy`, become dynamic with it and have its temperature.
        warm_start: start from the network's weights instead of fresh ones, see `kw_lightning.builder.apply_plan`.

    Attributes:
        temperature: the annealing.
        attention: the statistics; None when the recipe logs none.

    Raises:
        RecipeError: a recipe that cannot be used.

    Example:
        >>> trainer = Trainer(callbacks=[KWCallback("recipe.yaml")])
    """

    def __init__(
        self, recipe: str | Path | dict[str, Any], module: str | None = None, warm_start: bool = False
    ) -> None:
        self.recipe = callback_recipe(recipe)
        self.module = module
        self.warm_start = warm_start
        self.temperature, self.attention = method_callbacks(self.recipe, module, warm_start=warm_start)
        self._undo: list[Callable[[], None]] = []
        self._converted_copies: tuple[str, ...] = ()

    @property
    def state_key(self) -> str:
        warehouses = ",".join(warehouse.name for warehouse in self.recipe.warehouses)
        return self._generate_state_key(module=self.module, warehouses=warehouses)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the network dynamic now, or right after `configure_model` when layers may be built until then."""
        self._check_order(trainer, pl_module)
        self._end()
        if builds_layers_late(pl_module):
            self._undo.append(after_configure_model(pl_module, lambda: self._convert(trainer, pl_module)))
            if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                pl_module.configure_model()  # now, because that callback copies the network in its setup
        else:
            self._convert(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be seen only now: how the strategy sharded the network, and that all of it is trained."""
        assert trainer.strategy.model is not None
        check_sharding(trainer.strategy.model)
        if not isinstance(trainer.strategy.model, FullyShardedDataParallel):  # it has parameters of its own
            self._check_optimizers(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the temperature, that of copies made since too; see `TemperatureAnnealing`."""
        self.temperature.copies = self._copies(trainer, pl_module)
        self.temperature.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the temperature for the coming step; see `TemperatureAnnealing`."""
        self.temperature.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give way to a module that logs a temperature of its own; see `TemperatureAnnealing`."""
        self.temperature.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the attentions; see `AttentionStatistics`."""
        if self.attention is not None:
            self.attention.on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the attentions' statistics; see `AttentionStatistics`."""
        if self.attention is not None:
            self.attention.on_validation_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind; the network stays dynamic."""
        self._end()
        self.temperature.teardown(trainer, pl_module, stage)
        if self.attention is not None:
            self.attention.teardown(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the recipe, the layout of the warehouses and the data module's `classes` into the checkpoint."""
        entry = describe(self.recipe, self.module, submodule(pl_module, self.module), self._converted_copies)
        checkpoint.setdefault(KEY, []).append(entry)
        checkpoint.setdefault(CLASSES, class_names_of(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the annealing and of the statistics."""
        attention = None if self.attention is None else self.attention.state_dict()
        return {"temperature": self.temperature.state_dict(), "attention": attention}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the state of the annealing and of the statistics."""
        self.temperature.load_state_dict(state_dict["temperature"])
        if self.attention is not None and state_dict["attention"] is not None:
            self.attention.load_state_dict(state_dict["attention"])

    def _convert(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not dynamic_layers(submodule(pl_module, self.module)):
            check_strategy(trainer, self.module)
        copies = self._copies(trainer, pl_module)
        if copies and not dynamic_layers(submodule(pl_module, self.module)):
            named = " and ".join(f'"{copy}"' for copy in copies)
            rank_zero_info(f'{named}: as a copy of "{self.module}" made dynamic with it, from the same weights')
        alike = pairs(pl_module) if self.module is None else []
        network = make_dynamic(pl_module, self.recipe, self.module, copies=copies, warm_start=self.warm_start)
        for part, copy in alike:
            if dynamic_layers(pl_module.get_submodule(part)) and not dynamic_layers(pl_module.get_submodule(copy)):
                rank_zero_warn(
                    f'"{part}" is dynamic now, and "{copy}", a copy of it, is not: where one is made of the other\'s '
                    f'weights, as moving averages are, give KWCallback module="{part}" and names inside it'
                )
        self._converted_copies = copies
        self._undo += [refuse_other_weights(part) for part in (network, *map(pl_module.get_submodule, copies))]

    def _copies(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, ...]:
        # What another KWCallback is for is no copy, however alike the two are.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = {callback.module for callback in callbacks if isinstance(callback, KWCallback)}
        return tuple(path for path in copies_of(pl_module, self.module) if path not in others)

    def _end(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _check_order(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            averages = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
            if (averages or isinstance(callback, ModelPruning)) and not dynamic_layers(pl_module):
                name, done = type(callback).__name__, "copied" if averages else "looked for weights in"
                raise KWError(
                    f"{name} has {done} the network before it is made dynamic: "
                    f"list KWCallback first, as callbacks=[KWCallback(...), {name}(...)]"
                )

    def _check_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if not trained:  # a fit without any optimizer, which Lightning warns of
            return
        left_out = [
            f"{name}.{part}"
            for name, layer in dynamic_layers(submodule(pl_module, self.module)).items()
            for part, parameter in layer.named_parameters()
            if parameter.requires_grad and id(parameter) not in trained
        ]
        if left_out:
            raise KWError(
                f"no optimizer trains {listed(left_out)}: were they collected before the network was made "
                'dynamic, or by names, as those that end in "weight" or "bias"? Read self.parameters() in '
                "configure_optimizers, or freeze them by requires_grad_(False)"
            )
