"""Stop a run at the first loss that is not a number, and say where the computation failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from kw_lightning.callbacks.exact_checkpoint import agreed
from kw_lightning.callbacks.resume import of_every_process
from kw_lightning.errors import RunError, first_line

HINT = "lower the learning rate, clip the gradients, or compute in bf16 or 32 bits instead of 16"


class NonFiniteError(RunError):
    """The loss or the weights of a run are infinite or not a number."""


class FiniteLoss(Callback):
    """Ends training at the first loss that is infinite or not a number, before the weights take it in.

    The batch is computed once more, but not with manual optimization, to find the layer whose activations failed first;
    weights that failed in the step before are named instead. Checkpoints with such weights are not written, so the last
    one is finite. Of several processes all stop, at the end of the batch.

    Args:
        on_nan: "stop", or "warn" to say it once and go on.
        hint: what to do about it.

    Raises:
        ValueError: another `on_nan`.

    Example:
        >>> trainer = Trainer(callbacks=[FiniteLoss()])
    """

    def __init__(self, on_nan: Literal["stop", "warn"] = "stop", hint: str = HINT) -> None:
        if on_nan not in ("stop", "warn"):
            raise ValueError(f'on_nan is "stop" or "warn": found "{on_nan}"')
        self.on_nan, self.hint = on_nan, hint
        self._batch: tuple[Any, int] | None = None
        self._problem: str | None = None
        self._said = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to compute it again where that is needed."""
        self._batch = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss.

        Raises:
            NonFiniteError: it is infinite or not a number.
        """
        if self._said or self._problem or bool(torch.isfinite(loss).all()):
            return
        assert self._batch is not None
        where = first_failure(trainer, pl_module, *self._batch)
        step = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1})"
        self._problem = f"the loss is {float(loss.detach().flatten()[0])} in {step}: {where}"
        if trainer.world_size == 1:
            self._act(self._problem, trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let all processes know what one of them found.

        Raises:
            NonFiniteError: the loss of one of them is infinite or not a number.
        """
        self._batch = None
        if trainer.world_size > 1 and not self._said and any(agreed(trainer, int(self._problem is not None))):
            self._act(next(filter(None, of_every_process(self._problem))), trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep weights that failed out of checkpoints.

        Raises:
            NonFiniteError: there are some.
        """
        failed = failed_weights(pl_module)
        if any(agreed(trainer, int(failed is not None))) and not self._said:
            text = next(filter(None, of_every_process(failed)))
            self._act(f"after step {trainer.global_step} (epoch {trainer.current_epoch + 1}) {text}", trainer)

    def _act(self, problem: str, trainer: Trainer) -> None:
        rates = ", ".join(f"{group['lr']:g}" for group in trainer.optimizers[0].param_groups[:1])
        message = f"{problem}. The learning rate is {rates}; {self.hint}"
        self._problem, self._said = None, True
        if self.on_nan == "stop":
            raise NonFiniteError(message)
        rank_zero_warn(message)


def first_failure(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> str:
    """Return in words where a batch, whose loss is not finite, failed first."""
    failed = _failed(module.named_parameters())  # statistics have seen this batch already
    if failed is not None:
        return f"{failed}, so its gradients failed in the step before"
    if any(isinstance(leaf, Tensor) and _fails(leaf) for leaf in tree_leaves(batch)):
        return "the batch itself holds values that are infinite or not a number"
    if not module.automatic_optimization:  # the batch would be a step of every optimizer
        return "with manual optimization the layer that failed first is not looked for"
    found: list[str] = []
    ending = "no layer's activations failed, so it is the loss function itself"
    names = {child: name for name, child in module.named_modules() if not isinstance(child, Metric)}

    def look(child: nn.Module, inputs: Any, output: Any) -> None:
        if not found and any(_fails(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            found.append(f'the activations failed first in layer "{names[child]}" ({type(child).__name__})')

    hooks = [child.register_forward_hook(look) for child in names if child is not module]
    try:
        # eagerly: a compiled network does not see the hooks
        stance, precision = torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context()
        with _unchanged(module), torch.no_grad(), stance, precision:
            module.training_step(batch, index)
    except Exception as error:  # only a diagnosis: the loss is the error to tell
        ending = f"computing the batch again, to find the layer, ended in {type(error).__name__}: {first_line(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ending


def failed_weights(module: nn.Module) -> str | None:
    """Return in words which weights are not finite, the first of them by name; None where all are."""
    return _failed([*module.named_parameters(), *module.named_buffers()])


def _failed(values: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, value in values:
        if _fails(value):
            return f'the weights "{name}" are infinite or not a number'
    return None


def _fails(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value.detach()).all())


@contextmanager
def _unchanged(module: LightningModule) -> Iterator[None]:
    """Take back what computing a batch changes besides gradients: buffers, metrics, random numbers, what is logged."""
    buffers = [
        (child, name, buffer) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)
    ]
    copies = {buffer: buffer.clone() for _, _, buffer in buffers}
    for child, name, buffer in buffers:  # in place, those of a backward pass that is to come would change
        setattr(child, name, copies[buffer])
    metrics = [child for child in module.modules() if isinstance(child, Metric)]
    states = [deepcopy(dict(metric.metric_state)) for metric in metrics]
    vars(module).update(log=lambda *_, **__: None, log_dict=lambda *_, **__: None)
    try:
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            yield
    finally:
        for child, name, buffer in buffers:
            setattr(child, name, buffer)
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
