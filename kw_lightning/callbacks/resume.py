"""What an exact resume needs besides Lightning's checkpoint: the data's order and the random numbers.

Lightning restores weights, optimizers, schedules and the numbers of epoch, batch and step. A run that was killed in the
middle of an epoch goes on to the bit when, besides, the training data is a `ResumableDataLoader`, `RandomState` is
among the callbacks and checkpoints are written by `ExactCheckpoint` and `AtomicCheckpointIO`; with `RunningMetrics` so
do the metrics that the epoch logs at its end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import Metric

from kw_lightning.errors import kind, sentence

METRICS, LOADERS = "running_metrics", "resumable_loaders"  # of a checkpoint


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader that Lightning resumes at the batch where the checkpoint was written, without reading those before.

    The order of an epoch follows from a generator of its own (or from `sampler.set_epoch`, as with the
    DistributedSampler that Lightning puts in), so the global random numbers have no part in it.

    With random augmentation in worker processes a resume in mid-epoch repeats the order but not the augmentation,
    because the workers start anew; with `num_workers=0` it is exact. With a checkpoint from the end of an epoch, after
    `limit_train_batches` or `trainer.estimated_stepping_batches`, Lightning leaves the loader at its beginning, and
    `RandomState` puts it where it was.

    Args:
        dataset: a data set with a length.
        batch_size, shuffle, **options: as of `torch.utils.data.DataLoader`.
        generator: of the order; by default seeded by torch's seed.

    Raises:
        TypeError: a data set without a length, **or** one that is iterated over.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            allowed = "one with a length whose samples are asked for by number; a stream has to keep its place itself"
            raise TypeError(sentence(f"{kind(dataset)} in the place of a data set", allowed))
        if generator is None:
            generator = torch.Generator().manual_seed(torch.initial_seed())
        super().__init__(dataset, batch_size, shuffle, generator=generator, **options)
        sampler = self._epoch_sampler()
        order: Any = getattr(sampler, "generator", None)
        if order is generator:  # of its own, because workers that start draw from the loader's
            order = sampler.generator = torch.Generator()
            order.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        self._order: Any = order or self.generator
        self._batches = 0
        self._skip = 0
        self._epoch_start = self._order.get_state()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._epoch_start = self._order.get_state()
        self._batches, end = skip, self._epoch_start
        for batch in self._from_batch(skip) if skip else super().__iter__():
            self._batches, end = self._batches + 1, self._order.get_state()
            yield batch
        self._order.set_state(end)  # that a sampler draws once more when it is asked for more than it has is forgotten

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands: the number of batches handed out and what its order follows from."""
        if not 0 < self._batches < len(self):
            return self.state_between_epochs()
        epoch = getattr(self._epoch_sampler(), "epoch", None)
        return {"batches": self._batches, "generator": self._epoch_start, "epoch": epoch}

    def state_between_epochs(self) -> dict[str, Any]:
        """Return where the next epoch stands, however many batches of the last one were wanted."""
        return {"batches": 0, "generator": self._order.get_state(), "epoch": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, in the next `iter`."""
        self._skip = self._batches = state_dict["batches"]
        self._epoch_start = state_dict["generator"]
        self._order.set_state(state_dict["generator"])
        if state_dict["epoch"] is not None and hasattr(self._epoch_sampler(), "set_epoch"):
            self._epoch_sampler().set_epoch(state_dict["epoch"])

    def _epoch_sampler(self) -> Any:
        return getattr(self.batch_sampler, "sampler", self.sampler)

    def _from_batch(self, skip: int) -> Iterator[Any]:
        # The indices of the rest of the epoch, in lists of one batch; single ones where there are no batches.
        indices = islice(iter(self.sampler if self.batch_sampler is None else self.batch_sampler), skip, None)
        rest: dict[str, Any] = {"sampler": indices, "batch_size": None}
        if self.batch_sampler is not None:
            rest = {"batch_sampler": indices}
        return iter(
            DataLoader(
                self.dataset,
                num_workers=self.num_workers,
                collate_fn=self.collate_fn,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=self.worker_init_fn,
                multiprocessing_context=self.multiprocessing_context,
                generator=self.generator,
                prefetch_factor=self.prefetch_factor,
                **rest,
            )
        )


class RandomState(Callback):
    """Keeps the random numbers of every process in the checkpoint: torch's, CUDA's, NumPy's and Python's.

    Without it a resumed run draws other dropout masks and augmentations than the run that was not interrupted, and one
    that goes on at the beginning of an epoch has its images in the order of the first.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._loaders: list[list[dict[str, Any]]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a checkpoint that another call than this, as `trainer.test`, has read."""
        self._restored = self._loaders = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add where every `ResumableDataLoader` of every process stands: Lightning forgets it between epochs."""
        inside = inside_epoch(trainer)
        checkpoint[LOADERS] = of_every_process(
            [loader.state_dict() if inside else loader.state_between_epochs() for loader in _loaders(trainer)]
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep that until training starts."""
        self._loaders = checkpoint.get(LOADERS)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every process, in the order of their ranks."""
        return {"processes": of_every_process(_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: the sanity check and the data loaders draw numbers before."""
        self._restored = state_dict["processes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set this process's random numbers and loaders; another number of processes than before has new ones."""
        if self._restored is not None and len(self._restored) == trainer.world_size:
            _set_random_state(self._restored[trainer.global_rank])
        if self._loaders is not None and len(self._loaders) == trainer.world_size:
            for loader, state in zip(_loaders(trainer), self._loaders[trainer.global_rank], strict=False):
                loader.load_state_dict(state)
        self._restored = self._loaders = None


class RunningMetrics(Callback):
    """Keeps the metrics of an epoch so far in a checkpoint that is written inside it, those of every process.

    Without it the mean of a resumed epoch covers only the rest, and another checkpoint can become the best. It keeps
    the torchmetrics objects that the module logs; plain numbers are averaged by Lightning, which begins anew.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a checkpoint that another call than this, as `trainer.test`, has read."""
        self._restored = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metrics' sums and counts inside an epoch."""
        if inside_epoch(trainer):
            checkpoint[METRICS] = of_every_process(
                {name: _to_cpu(metric.metric_state) for name, metric in _metrics(pl_module).items()}
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the sums and counts until training starts."""
        self._restored = checkpoint.get(METRICS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set this process's metrics; another number of processes than before begins them anew."""
        restored, self._restored = self._restored, None
        if restored is None or len(restored) != trainer.world_size:
            return
        metrics = _metrics(pl_module)
        for name, state in restored[trainer.global_rank].items():
            for key, value in state.items() if name in metrics else ():
                setattr(metrics[name], key, _to_device(value, metrics[name].device))


def inside_epoch(trainer: Trainer) -> bool:
    """Tell whether an epoch has begun and its last batch, with the evaluation after it, is not done."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    inside: bool = progress.ready != progress.processed
    return inside


def of_every_process(value: Any) -> list[Any]:
    """Return a value of every process, in the order of their ranks; each of them has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _loaders(trainer: Trainer) -> list[ResumableDataLoader]:
    return [loader for loader in tree_leaves(trainer.train_dataloader) if isinstance(loader, ResumableDataLoader)]


def _metrics(module: LightningModule) -> dict[str, Metric]:
    return {name: child for name, child in module.named_modules() if isinstance(child, Metric)}


def _to_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _to_device(value, torch.device("cpu")) for key, value in state.items()}


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value


def _random_state() -> dict[str, Any]:
    # In types that `torch.load(weights_only=True)` reads.
    numpy: Any = np.random.get_state()
    name, keys, *rest = numpy
    version, python, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, torch.tensor(python), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
