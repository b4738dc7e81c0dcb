"""Annealing the attention's temperature over the optimizer steps of a fit.

Paper: KernelWarehouse (ICML 2024), section 3.3, equation 3: τ falls linearly from 1 to 0 at the start of training.
https://arxiv.org/abs/2406.07879
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from kw_lightning.callbacks.conversion import submodule
from kw_lightning.errors import KWError, mistake, sentence
from kw_lightning.nn import Warehouse
from kw_lightning.nn.weighing import SoftmaxAnnealing

Shape = Literal["linear", "cosine", "constant"]
SHAPES: tuple[Shape, ...] = ("linear", "cosine", "constant")
NAME, OTHER_NAME = "temperature", "attention_temperature"  # in the logs; the other where the module has one
DEFAULT_PART = 0.1  # of a run, where neither steps nor epochs are given: 10 of 100 epochs and 15 of 150, as published


def temperature_at(
    step: int, total_steps: int, *, start: float = 1.0, end: float = 0.0, shape: Shape = "linear"
) -> float:
    """Return τ before optimizer step `step` = 1, 2, … of an annealing over `total_steps`.

    From 1 to 0 the linear shape is τ = max(0, (T − t) / T), the published schedule.

    Args:
        step: t, the number of the optimizer step that comes next, from 1.
        total_steps: T; after it τ stays at `end`.
        start, end: τ before the annealing and after it.
        shape: "linear", "cosine" (half a wave), or "constant", which stays at `start`.

    Raises:
        ValueError: another shape.
    """
    if shape not in SHAPES:
        raise ValueError(mistake(shape, SHAPES, what="the unknown shape"))
    if shape == "constant":
        return start
    left = (total_steps - step) / total_steps if step < total_steps else 0.0
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return end + (start - end) * left


class TemperatureAnnealing(Callback):
    """Sets the temperature of every warehouse before each optimizer step, as a pure function of its number.

    Nothing is counted here, so a resumed run goes on at the exact value, in the middle of an epoch too, and neither
    the sanity check nor validation moves it. Gradient accumulation, `max_steps` and epochs as fractions are taken into
    account. A new Trainer begins at step 0 again, and so does the temperature.

    With manual optimization several optimizers may step in a batch or take turns, and Lightning's `global_step` adds
    them all; so there a step is a training batch, here and wherever a length is given in steps.

    It is logged as `temperature`; where the module logs another by that name, as `attention_temperature`.

    Averages of the network get the same temperature (see `Warehouse`): one of past temperatures would lag behind.

    A warehouse whose attention is a softmax with a temperature T of its own (`Warehouse.softmax_annealing`) has that
    set alike, linearly, by the same step number, and logged as `softmax_temperature`.

    Args:
        start, end: τ at the start and at the end of the annealing, in [0, 1]. By default it starts at 1, and at 0 after
            a warm start under a budget of 1, which reaches the old kernels there.
        epochs: its length in epochs, which may be a fraction.
        steps: its length in optimizer steps; give this or `epochs`. Without either it takes a tenth of the run.
        shape: "linear", "cosine" or "constant".
        module: path of the submodule whose warehouses are meant; the whole LightningModule by default.
        warm_start: whether the network started from static kernels.

    Attributes:
        copies: paths of copies of that submodule, whose warehouses get the same temperature.

    Raises:
        ValueError: a temperature outside [0, 1], both `epochs` and `steps`, one that is negative or infinite, **or** an
            unknown shape.

    Example:
        >>> trainer = Trainer(callbacks=[TemperatureAnnealing(epochs=20)])
    """

    def __init__(
        self,
        start: float | None = None,
        end: float = 0.0,
        epochs: float | None = None,
        steps: int | None = None,
        shape: Shape = "linear",
        module: str | None = None,
        warm_start: bool = False,
    ) -> None:
        for name, value in (("start", 1.0 if start is None else start), ("end", end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(mistake(value, "a temperature between 0 and 1", what=name))
        if epochs is not None and steps is not None:
            raise ValueError(sentence(f"epochs={epochs} and steps={steps}", "one of them"))
        for name, length in (("epochs", epochs), ("steps", steps)):
            if length is not None and not 0 <= length < math.inf:
                raise ValueError(mistake(length, "a number of at least 0", what=name))
        if shape not in SHAPES:
            raise ValueError(mistake(shape, SHAPES, what="the unknown shape"))
        self.start, self.end, self.epochs, self.steps, self.shape = start, end, epochs, steps, shape
        self.module = module
        self.warm_start = warm_start
        self.copies: tuple[str, ...] = ()
        self.temperature: float | None = None
        self.total_steps: int | None = None
        self._saved_total_steps: int | None = None
        self._logged_as = NAME
        self._warehouses: list[Warehouse] = []
        self._softmax_steps: dict[SoftmaxAnnealing, int] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    def at(self, step: int, total_steps: int) -> float:
        """Return τ before optimizer step `step` = 1, 2, … of an annealing over `total_steps`."""
        start = self.start
        if start is None:
            start = 0.0 if self._starts_under_one() else 1.0
        return temperature_at(step, total_steps, start=start, end=self.end, shape=self.shape)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the length of the annealing and set τ: only now has a resumed run its step number back."""
        self._warehouses = self._find_warehouses(pl_module)
        if not self._warehouses:
            raise KWError(
                "TemperatureAnnealing found no warehouse in the network: convert it first, "
                'with kw_lightning.convert(network, recipe) or with KWCallback("recipe.yaml") in its place'
            )
        self.total_steps = annealing_steps(trainer, self.epochs, self.steps) if self.shape != "constant" else 0
        annealings = {warehouse.softmax_annealing for warehouse in self._warehouses} - {None}
        self._softmax_steps = {one: annealing_steps(trainer, one.epochs) for one in annealings if one is not None}
        self._warn_of_a_changed_length()
        self._warn_of_a_short_run(trainer)
        self._set(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set τ for the coming optimizer step, and log it."""
        self._set(trainer)
        if trainer.barebones:
            return
        values = {self._logged_as: self.temperature or 0.0, **self._softmax_temperatures(trainer)}
        # A batch size, because Lightning asks for one where training_step takes the `dataloader_iter`.
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give way, from an epoch's first batch on, to a module that logs a temperature of its own by that name."""
        if batch_idx or trainer.barebones or self._logged_as != NAME:
            return
        logged = trainer.logged_metrics.get(NAME)
        if logged is not None and not math.isclose(float(logged), self.temperature or 0.0, abs_tol=1e-6):
            self._logged_as = OTHER_NAME
            rank_zero_warn(
                f'the module logs a "{NAME}" of its own ({float(logged):.3g}), which hides that of the attention '
                f'({self.temperature:.3g}); this is logged as "{OTHER_NAME}" from now on'
            )

    def state_dict(self) -> dict[str, Any]:
        """Return τ and the length of the annealing: to read in a checkpoint, and to notice when the length changes."""
        return {"temperature": self.temperature, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint says; the step number alone decides how τ goes on."""
        self.temperature = state_dict["temperature"]
        self._saved_total_steps = state_dict["total_steps"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the network, and of a checkpoint that was not for training."""
        self._warehouses = []
        self._saved_total_steps = None

    def _set(self, trainer: Trainer) -> None:
        self.temperature = self.at(next_step(trainer), self.total_steps or 0)
        for warehouse in self._warehouses:
            warehouse.set_temperature(self.temperature)
            if warehouse.softmax_annealing is not None:
                warehouse.set_softmax_temperature(self._softmax_at(warehouse.softmax_annealing, trainer))

    def _softmax_at(self, annealing: SoftmaxAnnealing, trainer: Trainer) -> float:
        total_steps = self._softmax_steps[annealing]
        return temperature_at(next_step(trainer), total_steps, start=annealing.start, end=annealing.end)

    def _softmax_temperatures(self, trainer: Trainer) -> dict[str, float]:
        """Return T to log: by the warehouse's name where they differ."""
        if len(self._softmax_steps) == 1:
            return {"softmax_temperature": self._softmax_at(next(iter(self._softmax_steps)), trainer)}
        return {
            f"softmax_temperature/{warehouse.name}": self._softmax_at(warehouse.softmax_annealing, trainer)
            for warehouse in self._warehouses
            if warehouse.softmax_annealing is not None
        }

    def _find_warehouses(self, pl_module: LightningModule) -> list[Warehouse]:
        networks = [submodule(pl_module, self.module or None), *map(pl_module.get_submodule, self.copies)]
        return [module for network in networks for module in network.modules() if isinstance(module, Warehouse)]

    def _starts_under_one(self) -> bool:
        return self.warm_start and any(len(warehouse.cells) < warehouse.mixtures for warehouse in self._warehouses)

    def _warn_of_a_changed_length(self) -> None:
        saved, self._saved_total_steps = self._saved_total_steps, None
        if saved is not None and saved != self.total_steps:
            rank_zero_warn(
                f"the temperature's annealing takes {self.total_steps} optimizer steps now and took {saved} in the "
                "checkpoint (batch size, devices or accumulation changed?); it goes on by the new length"
            )

    def _warn_of_a_short_run(self, trainer: Trainer) -> None:
        total_steps, run = self.total_steps or 0, run_steps(trainer)
        if total_steps > run and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            last = self.at(int(run), total_steps)
            rank_zero_warn(
                f"the run ends after {run:.0f} optimizer steps, before the temperature's annealing over {total_steps}: "
                f"its last step is taken at τ = {last:.3g}, not {self.end:g}"
            )


def next_step(trainer: Trainer) -> int:
    """Return the number of the step that the coming batch is part of, from 1; for `on_train_batch_start`.

    It follows from what Lightning's checkpoints restore alone.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step + 1
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed + 1


def annealing_steps(trainer: Trainer, epochs: float | None = None, steps: int | None = None) -> int:
    """Return the length of an annealing in optimizer steps; for `on_train_start` and later.

    Raises:
        KWError: a length in epochs where an epoch has no length, **or** none given where the run has none.
    """
    if steps is not None:
        return steps
    length = run_steps(trainer) * DEFAULT_PART if epochs is None else _steps_of_epochs(trainer, epochs)
    if length == math.inf:
        raise KWError(
            "the temperature's annealing needs a length in steps, because the training data "
            "or the run has none to take a part of: `temperature: {steps: 10000}` or TemperatureAnnealing(steps=10000)"
        )
    return max(round(length), 1) if epochs is None else round(length)


def run_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of the whole fit, infinity where it has no end; for `on_train_start` and later."""
    # Not `trainer.estimated_stepping_batches`: that refuses an accumulation that changes between epochs.
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if not trainer.lightning_module.automatic_optimization:  # `max_steps` adds all optimizers, as `global_step` does
        by_steps /= max(len(trainer.optimizers), 1)
    endless = trainer.max_epochs is None or trainer.max_epochs < 0
    return min(by_steps, math.inf if endless else _steps_of_epochs(trainer, trainer.max_epochs or 0))


def _steps_of_epochs(trainer: Trainer, epochs: float) -> float:
    batches = trainer.num_training_batches
    if batches == math.inf:
        return math.inf
    steps = 0.0
    for epoch in range(math.ceil(epochs)):
        steps += math.ceil(batches / _accumulation(trainer, epoch)) * min(1.0, epochs - epoch)
    return steps


def _accumulation(trainer: Trainer, epoch: int) -> int:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
