"""The LightningModule of `kw-fit`: classification with the network of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from kw_lightning.builder import build
from kw_lightning.callbacks.checkpoint import KEY, class_names_of, describe
from kw_lightning.errors import RecipeError, RunError, sentence
from kw_lightning.fit.by_class import ClassMetrics, class_counters, class_metrics
from kw_lightning.fit.data.splitting import SPLIT
from kw_lightning.fit.distillation import Teacher, distillation_loss, find_teacher
from kw_lightning.fit.groups import freeze, parameter_groups
from kw_lightning.fit.label_metrics import label_metrics
from kw_lightning.fit.losses import measured_loss, training_loss
from kw_lightning.fit.optimization import make_optimizer, make_schedule
from kw_lightning.fit.weighting import class_weights
from kw_lightning.nn.finishing import add_epilogues
from kw_lightning.planning import Plan, plan
from kw_lightning.preprocessing import CLASSES, PREPROCESSING, preprocessing
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.types import Recipe, Train
from kw_lightning.recipe.variables import escape

TOP = 5


class Classifier(LightningModule):
    """Image classification: loss, accuracy, optimizer and schedule of the recipe.

    Its one hyperparameter is the recipe as plain data, so a checkpoint holds all that is needed to build it again:
    `Classifier.load_from_checkpoint(path, weights_only=True)`.

    Args:
        recipe: the recipe, its plain data or its plan; no file and no name.
        allow_python: packages whose code the recipe may name.
        pretrained: whether to load the pretrained weights that the recipe names; not when a checkpoint follows.

    Attributes:
        plan: what was built.
        recipe: the recipe.
        network: the KernelWarehouse network, or the static one of a recipe without warehouses.
        teacher: what it learns from besides the data, from the start of training on, where the recipe names one.

    Notation:
        - b: images in the batch, c: channels, h, w: height and width, k: classes
    """

    def __init__(
        self, recipe: Plan | Recipe | Mapping[str, Any], *, allow_python: Sequence[str] = (), pretrained: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(recipe, Plan | Recipe | Mapping):  # in a stranger's checkpoint a text would open any file
            raise TypeError(f"a recipe is a map or what load_recipe returns: found a {type(recipe).__name__}")
        source = load_recipe(recipe) if isinstance(recipe, Mapping) else recipe
        self.plan = source if isinstance(source, Plan) else plan(source, allow_python=allow_python)
        self.recipe = self.plan.recipe
        self.train_settings = self.recipe.train or Train()
        self.several = self.recipe.several
        self.save_hyperparameters({"recipe": escape(self.recipe.document.data), "pretrained": False}, logger=False)
        self.network = build(self.plan, allow_python=allow_python, pretrained=pretrained)
        freeze(self.recipe, self.network)
        # no buffer: they follow from the data, and an average of the weights has the buffers that the module began with
        self.class_weights: Tensor | None = None
        self.teacher: Teacher | None = None
        self.allow_python = tuple(allow_python)
        self.finishes = False  # whether the network has its epilogues
        # "disable": a loss that is not a number is to be seen, and torchmetrics would leave it out of the mean
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.loss = MeanMetric(nan_strategy="disable")
        # micro average: the share of images that are right, whatever the number of classes
        self.accuracy = MulticlassAccuracy(average="micro")
        self.shows_top5 = True  # of five classes or fewer the best five are all
        # torchmetrics' own top-k wants to know the number of classes here
        self.top5 = MeanMetric(nan_strategy="disable")
        self.label_metrics: MetricCollection | None = None  # of several labels; they want to know it too
        self.class_counters: MetricCollection | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what evaluation does to an image into the checkpoint, since a library's defaults may be others later.

        The names of the classes go there too, and which images validate, where the data module has any (`classes`,
        `split`), and what KWCallback writes.
        """
        if self.plan.warehouses:
            checkpoint.setdefault(KEY, []).append(describe(self.recipe, "network", self.network))
        steps = preprocessing(self.recipe)
        checkpoint[PREPROCESSING] = steps.to_dict() if steps is not None else None
        checkpoint[CLASSES], checkpoint[SPLIT] = None, None
        with suppress(RuntimeError):  # no Trainer: a checkpoint that is put together by hand
            split = getattr(getattr(self.trainer, "datamodule", None), "split", None)
            checkpoint[CLASSES] = class_names_of(self.trainer)
            checkpoint[SPLIT] = split.to_dict() if split is not None else None

    def on_fit_start(self) -> None:
        """Weigh the classes, find the teacher, and compile the network, in place: the state's keys stay as they are."""
        data = getattr(self.trainer, "datamodule", None)
        weights = class_weights(self.recipe, data)
        self.class_weights = weights if weights is None else weights.to(self.device)
        teacher = self.teacher or find_teacher(self.recipe, data, allow_python=self.allow_python)
        self.teacher = teacher if teacher is None else teacher.to(self.device)
        if self.train_settings.channels_last:
            for parameter in self.network.parameters():
                if parameter.ndim == 4:  # cells of warehouses have a dimension more
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        mode = self.train_settings.compile
        if mode:
            self.network.compile(mode=mode if isinstance(mode, str) else None)
        advice = advice_on_graphs(self.train_settings, self.device) if self.plan.warehouses else None
        if advice is not None:
            rank_zero_warn(advice)

    def forward(self, images: Tensor) -> Tensor:  # [b x c x h x w] -> [b x k]
        """Return the logits.

        Raises:
            RecipeError: the network answers with something else.
        """
        if self.train_settings.channels_last and images.ndim == 4:
            images = images.to(memory_format=torch.channels_last)
        logits = self.network(images)
        if not isinstance(logits, Tensor):
            mode = "in training" if self.training else "in evaluation"
            more = any(name.startswith("aux_logits") for name in getattr(logits, "_fields", ()))
            cure = "set model.args.aux_logits to false" if more else ""
            message = sentence(f"an output of type {type(logits).__name__} {mode}", "a tensor [batch, classes]", cure)
            raise RecipeError(self.recipe.document.problem("model", message))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss; targets are classes [b], or shares of classes [b x k] of several labels and after mixup."""
        images, targets = batch
        self._check_targets(targets)
        logits = self(images)
        loss = training_loss(logits, targets, self.train_settings, self.class_weights, several=self.several)
        if self.teacher is not None and (distill := self.train_settings.distill) is not None:
            single = self.train_settings.loss.name != "cross_entropy"
            taught = distillation_loss(logits, self.teacher(images), distill, single=single)
            loss = (1 - distill.weight) * loss + distill.weight * taught
        self.train_loss(loss.detach())
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log(f"lr-{self.train_settings.optimizer.name}", rate, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count right answers, and the loss without smoothing and weights of classes, as `val/…`."""
        self._measure(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Do the same as `test/…`."""
        self._measure(batch, "test")

    def _measure(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        images, targets = batch
        logits = self(images).float()
        self._check_targets(targets)
        self.loss(measured_loss(logits, targets, self.train_settings.loss))
        answers = logits.sigmoid() if self.several else logits  # torchmetrics would take logits from 0 to 1 as they are
        if self.trainer.state.fn != TrainerFn.FITTING:
            if self.class_counters is None:
                self.class_counters = class_counters(logits.shape[1], several=self.several).to(self.device)
            self.class_counters.update(answers, targets.long())
        if self.several:
            if self.label_metrics is None:
                self.label_metrics = label_metrics(logits.shape[1]).to(self.device)
            self.label_metrics.update(answers, targets.long())
            self.log(f"{part}/loss", self.loss, on_step=False, on_epoch=True, prog_bar=True)
            return
        self.accuracy(logits, targets)
        nearest = logits.topk(min(TOP, logits.shape[1])).indices  # [b x 5]
        self.top5((nearest == targets.unsqueeze(1)).any(dim=1).float())
        self.shows_top5 = logits.shape[1] > TOP
        metrics = {f"{part}/loss": self.loss, f"{part}/accuracy": self.accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        self.log(f"{part}/top5", self.top5, on_step=False, on_epoch=True, prog_bar=self.shows_top5)

    def on_validation_start(self) -> None:
        """Let layers do in evaluation what comes after them; where the network is compiled, the compiler does."""
        if not (self.finishes or self.train_settings.compile):
            self.finishes = True  # once: the network is followed for a while
            add_epilogues(self.network)

    def on_test_start(self) -> None:
        """Do the same."""
        self.on_validation_start()

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew, class by class."""
        self.class_counters = None

    def on_test_epoch_start(self) -> None:
        """Do the same."""
        self.class_counters = None

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of several labels, which torchmetrics has brought together from all processes."""
        self._log_label_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Do the same."""
        self._log_label_metrics("test")

    def by_class(self, names: Sequence[str] = ()) -> list[ClassMetrics]:
        """Return how well each class is recognised, after an evaluation outside of training; see `class_metrics`."""
        return class_metrics(self.class_counters, names) if self.class_counters is not None else []

    def _log_label_metrics(self, part: str) -> None:
        if self.label_metrics is not None:
            metrics = {f"{part}/{name}": value for name, value in self.label_metrics.compute().items()}
            self.log_dict(metrics, prog_bar=True, sync_dist=True)
            self.label_metrics.reset()

    def _check_targets(self, targets: Tensor) -> None:
        """Say what targets are needed, of data of one's own.

        Raises:
            RunError: they are of another shape.
        """
        if self.several and targets.ndim != 2:
            found = list(targets.shape)
            raise RunError(f"data.labels: several needs targets [batch, classes] of 0 and 1: found the shape {found}")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the recipe's optimizer, and its schedule, stepped once an optimizer step."""
        optimizer = make_optimizer(self.recipe, parameter_groups(self.recipe, self.network))
        total_steps, per_epoch = self._length()
        schedule = make_schedule(self.recipe, optimizer, total_steps, per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _length(self) -> tuple[int, float]:
        """Return the optimizer steps of the run and of an epoch.

        Not by the Trainer's `estimated_stepping_batches`: asking for it sets the data loader up before a resumed run's
        place in the data is restored, and the place is lost.
        """
        trainer = self.trainer
        try:
            batches = math.ceil(len(trainer.datamodule.train_dataloader()) / trainer.world_size)  # type: ignore[attr-defined]
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        except (AttributeError, TypeError):  # loaders without a data module, **or** without a length
            return max(int(trainer.estimated_stepping_batches), 1), float(trainer.num_training_batches)
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        total = per_epoch * max(trainer.max_epochs or 1, 1)
        return max(min(total, trainer.max_steps) if trainer.max_steps >= 0 else total, 1), float(per_epoch)


def advice_on_graphs(settings: Train, device: torch.device) -> str | None:
    """Return how dynamic layers take less time on a device, None where it is no GPU, asked for already or impossible.

    Args:
        settings: of the training.
        device: where it computes.
    """
    if device.type != "cuda" or settings.compile or settings.accumulate > 1:
        return None
    return (
        "a GPU waits for the CPU to start the operators of dynamic layers; train.compile=reduce-overhead records a "
        "step as CUDA graphs, in which ResNet18 took 0.4 and MobileNetV2 0.2 of the time on an H200, with "
        "train.precision=bf16-mixed and train.channels_last=true"
    )
