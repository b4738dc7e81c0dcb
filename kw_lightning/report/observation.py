"""What a network answers over a part of the data, image by image, watched while it is measured."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.fit.data.sets import file_of
from kw_lightning.fit.data.transformed import Transformed
from kw_lightning.fit.module import Classifier
from kw_lightning.report.attention import Array, Listening, WarehouseAttention

WORST = 20
"""Images with the highest loss that are shown."""
MOST_CLASSES = 2000
"""Classes up to which answers are counted for each pair of them."""


@dataclass(frozen=True)
class Answer:
    """What the network said of one image.

    Attributes:
        loss: without smoothing and weights of classes.
        image: as the network saw it, [channels, height, width] of an image.
        truth: numbers of the classes that it is of.
        said: numbers and scores (0 to 1) of the classes that were named: the likeliest, of several labels from 0.5 on.
        file: where it was read from; empty where that is not known.
    """

    loss: float
    image: Tensor
    truth: tuple[int, ...]
    said: tuple[tuple[int, float], ...]
    file: str = ""

    @property
    def right(self) -> bool:
        """Tell whether the classes named are those that it is of."""
        return {number for number, _ in self.said} == set(self.truth)


@dataclass(frozen=True)
class Observed:
    """What was seen of a pass.

    Attributes:
        confusion: images of each class (row) that were taken for each (column), [classes, classes]; None of several
            labels an image, **or** of very many classes.
        worst: the answers with the highest loss, the highest first.
        attention: of each warehouse.
        images: how many there were.
    """

    confusion: Array | None
    worst: tuple[Answer, ...]
    attention: tuple[WarehouseAttention, ...]
    images: int


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that stops watching where it fails: what is measured goes on."""

    @functools.wraps(hook)
    def guarded(self: Observation, *args: Any, **kwargs: Any) -> None:
        if self.failure is not None:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self.failure = error
            self._stop()

    return guarded


class Observation(Callback):
    """Watches a pass of a Trainer over validation or test images with a `Classifier`.

    Args:
        worst: how many of the worst answers are kept.

    Attributes:
        observed: what was seen of the last pass; None before it, and where watching failed.
        failure: what it failed for.
    """

    def __init__(self, worst: int = WORST) -> None:
        self.worst = worst
        self.observed: Observed | None = None
        self.failure: Exception | None = None
        self._listening = Listening()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._confusion: Tensor | None = None
        self._kept: list[tuple[float, int, Answer]] = []
        self._images = 0
        self._logits: Tensor | None = None
        self._hook: Any = None

    @_harmless
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the network."""
        assert isinstance(pl_module, Classifier)
        self.observed = None
        self._begin_anew()
        self._listening.begin(pl_module.network)
        self._hook = pl_module.network.register_forward_hook(self._keep_logits)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self.on_validation_start(trainer, pl_module)

    @_harmless
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the classes of the images that come."""
        self._listening.targets = batch[1]

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Do the same."""
        self.on_validation_batch_start(*args, **kwargs)

    @_harmless
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the answers, and keep the worst."""
        assert isinstance(pl_module, Classifier)
        assert self._logits is not None
        images, targets = batch
        logits = self._logits.detach().float()
        if pl_module.several:
            losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(dim=1)
        else:
            losses = F.cross_entropy(logits, targets, reduction="none")
            self._count(logits, targets)
        losses = losses.nan_to_num(nan=torch.inf)
        for place in losses.topk(min(self.worst, len(losses))).indices.tolist():
            loss = float(losses[place])
            number = self._images + place
            if len(self._kept) == self.worst and loss <= self._kept[0][0]:
                continue
            answer = _answer(loss, images[place], logits[place], targets[place], pl_module.several)
            heapq.heappush(self._kept, (loss, -number, answer))
            if len(self._kept) > self.worst:
                heapq.heappop(self._kept)
        self._images += len(losses)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Do the same."""
        self.on_validation_batch_end(*args, **kwargs)

    @_harmless
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._hook.remove()
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        samples = getattr(loaders, "dataset", None)
        named = isinstance(samples, Transformed) and len(samples) == self._images  # none was left out
        worst = []
        for _, number, answer in sorted(self._kept, key=lambda kept: (-kept[0], -kept[1])):
            file = file_of(samples.samples, -number) if named and isinstance(samples, Transformed) else ""
            worst.append(Answer(answer.loss, answer.image, answer.truth, answer.said, _short(file)))
        confusion = self._confusion.cpu().numpy() if self._confusion is not None else None
        attention = self._listening.end()
        if self._listening.failure is not None:
            raise self._listening.failure
        self.observed = Observed(confusion, tuple(worst), attention, self._images)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop()

    def _stop(self) -> None:
        self.observed = None
        if self._hook is not None:
            self._hook.remove()
        self._listening.stop()

    def _keep_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._logits = output

    def _count(self, logits: Tensor, targets: Tensor) -> None:
        classes = logits.shape[1]
        if classes > MOST_CLASSES:
            return
        pairs = torch.bincount(targets * classes + logits.argmax(dim=1), minlength=classes * classes)
        pairs = pairs.view(classes, classes)
        self._confusion = pairs if self._confusion is None else self._confusion + pairs


def _answer(loss: float, image: Tensor, logits: Tensor, target: Tensor, several: bool) -> Answer:
    if several:
        scores = logits.sigmoid()
        said = (scores >= 0.5).nonzero().flatten().tolist()
        truth = tuple(target.nonzero().flatten().tolist())
    else:
        scores = logits.softmax(dim=0)
        said, truth = [int(scores.argmax())], (int(target),)
    named = tuple((number, float(scores[number])) for number in said)
    return Answer(loss, image.detach().float().cpu().clone(), truth, named)


def _short(file: str) -> str:
    """Return a file by its folder and name: where a data set lies is nobody else's business."""
    return "/".join(Path(file).parts[-2:])
