"""Training images in tar shards, for data that outgrows one disk or has too many small files: a LightningDataModule.

    cd recipes/examples && kw-fit shards.yaml --allow-python shards data.args.root=/data/pets

Shards are those of WebDataset (`pip install webdataset`): tar files in which `0001.jpg` and `0001.cls` are an image and
the number of its class. `train-*.tar` trains, `val-*.tar` validates and `test-*.tar` tests. A shard is read from its
beginning to its end. The order follows from seed and epoch alone: of the shards, and of the images in a buffer. So a
run that was stopped inside an epoch goes on at the very next image, and with the same number of workers to the bit; the
images before it are passed over in the tar file without being decoded.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import webdataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

from kw_lightning.errors import RunError
from kw_lightning.fit.data.draws import own_random_numbers, seed_everywhere
from kw_lightning.fit.data.images import read_image

IMAGES = ("jpg", "jpeg", "png", "webp")
BUFFER = 1000
"""Images among which the next one is drawn; shards that were packed in a random order need no more."""


class Shards(LightningDataModule):
    """Images of `ROOT/train-*.tar`, and of `val-*.tar` and `test-*.tar` where there are any.

    Args:
        root: folder of the shards.
        classes: names of the classes, in the order of their numbers.
        size: side of the images that the network sees.
        batch_size, workers, seed: as of a recipe.

    Raises:
        RunError: no training shards.
    """

    def __init__(
        self, root: str, classes: Sequence[str], size: int, batch_size: int = 128, workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.classes, self.num_classes = tuple(classes), len(classes)
        self.size, self.batch_size, self.workers, self.seed = size, batch_size, workers, seed
        self.shards = {
            part: sorted(map(str, Path(root).expanduser().glob(f"{part}-*.tar"))) for part in ("train", "val", "test")
        }
        if not self.shards["train"]:
            raise RunError(f"{root}: no shards called train-*.tar")

    def train_dataloader(self) -> ShardLoader:
        """Return the training images: cut at random, flipped, in an order that is new in every epoch."""
        steps = v2.Compose([v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(), *_numbers()])
        return self._loader("train", steps, shuffle=True)

    def val_dataloader(self) -> ShardLoader | list[Any]:
        """Return the validation images; none without shards of them."""
        return self._evaluation("val")

    def test_dataloader(self) -> ShardLoader | list[Any]:
        """Return the test images; none without shards of them."""
        return self._evaluation("test")

    def _evaluation(self, part: str) -> ShardLoader | list[Any]:
        steps = v2.Compose([v2.Resize(self.size), v2.CenterCrop(self.size), *_numbers()])
        return self._loader(part, steps, shuffle=False) if self.shards[part] else []

    def _loader(self, part: str, steps: v2.Compose, *, shuffle: bool) -> ShardLoader:
        return ShardLoader(Batches(self.shards[part], steps, self.batch_size, self.seed, shuffle), self.workers)


def _numbers() -> list[v2.Transform]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]


class Batches(IterableDataset[tuple[int, Tensor, Tensor]]):
    """Batches of a worker's share of the shards, with the number of the worker.

    Attributes:
        epoch: that the order follows from.
        done: batches of each worker that the epoch has behind it.
        first: the worker whose batch comes next: the DataLoader's first worker takes its part.
    """

    def __init__(self, shards: Sequence[str], steps: v2.Compose, batch_size: int, seed: int, shuffle: bool) -> None:
        self.shards, self.steps, self.batch_size, self.seed, self.shuffle = shards, steps, batch_size, seed, shuffle
        self.epoch, self.done, self.first = 0, [0], 0
        self.counts = {shard: _count(shard) for shard in shards}

    def share(self, worker: int, workers: int) -> list[str]:
        """Return the shards that a worker of this process reads, which stay the same, in the order of this epoch."""
        rank, processes = _process()
        order = self.shards[rank + processes * worker :: processes * workers]
        return random.Random(f"{self.seed} {self.epoch}").sample(order, len(order)) if self.shuffle else list(order)

    def length(self, workers: int) -> int:
        """Return the batches of an epoch: as many in every process, those of the one that has fewest."""
        _, processes = _process()
        own = [self.shards[number :: processes * workers] for number in range(processes * workers)]
        batches = [-(-sum(self.counts[shard] for shard in shards) // self.batch_size) for shards in own]
        return min(sum(batches[rank::processes]) for rank in range(processes))

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        info = get_worker_info()
        place, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (place + self.first) % workers
        source = webdataset.SimpleShardList([f"file:{shard}" for shard in self.share(worker, workers)])
        stages: list[Any] = [source, webdataset.tarfile_to_samples()]
        if self.shuffle:
            order = random.Random(f"{self.seed} {self.epoch} {worker}")
            stages.append(webdataset.shuffle(BUFFER, initial=BUFFER, rng=order))
        samples = enumerate(webdataset.DataPipeline(*stages))
        for _ in islice(samples, self.done[worker] * self.batch_size):
            pass  # read, and not decoded
        while batch := list(islice(samples, self.batch_size)):
            images, targets = zip(*(self._decoded(sample, worker, number) for number, sample in batch), strict=True)
            yield worker, torch.stack(images), torch.tensor(targets)

    def _decoded(self, sample: dict[str, Any], worker: int, number: int) -> tuple[Tensor, int]:
        """Return an image and its class; nothing in a shard is unpickled or run."""
        kind = next((kind for kind in IMAGES if kind in sample), None)
        place = f"{sample['__url__']}: {sample['__key__']}"
        if kind is None or not sample.get("cls", b"").strip().isdigit():
            raise RunError(f"{place}: an image ({', '.join(IMAGES)}) and the number of its class (cls) are needed")
        with own_random_numbers():
            seed_everywhere(random.Random(f"{self.seed} {self.epoch} {worker} {number}").getrandbits(32))
            return self.steps(read_image(place, sample[kind])), int(sample["cls"])


class ShardLoader(DataLoader[Any]):
    """Loads `Batches`, and says and takes the place in an epoch, which Lightning keeps in checkpoints."""

    def __init__(self, batches: Batches, workers: int = 0) -> None:
        super().__init__(batches, batch_size=None, num_workers=workers)
        self.batches, self.readers = batches, max(workers, 1)
        batches.done = [0] * self.readers

    def __len__(self) -> int:
        return self.batches.length(self.readers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        self.load_state_dict(self.state_dict())
        batches = self.batches
        done = list(batches.done)  # by the workers' reading; `batches.done` is of what was handed out
        for worker, images, targets in super().__iter__():
            done[worker] += 1
            batches.done, batches.first = list(done), (worker + 1) % self.readers
            yield images, targets
            if sum(done) == len(self):
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch; after its last batch the beginning of the next."""
        batches = self.batches
        if sum(batches.done) == len(self):
            return {"epoch": batches.epoch + 1, "done": [0] * self.readers, "first": 0}
        return {"epoch": batches.epoch, "done": list(batches.done), "first": batches.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there in the next `iter`.

        Raises:
            RunError: inside an epoch of another number of workers.
        """
        if len(state_dict["done"]) != self.readers and any(state_dict["done"]):
            raise RunError(
                f"this checkpoint is from inside an epoch of {len(state_dict['done'])} workers: go on with as many"
            )
        self.batches.epoch, self.batches.first = state_dict["epoch"], state_dict["first"]
        self.batches.done = list(state_dict["done"]) if any(state_dict["done"]) else [0] * self.readers


def _count(shard: str) -> int:
    """Return the images of a shard, from the heads in the tar file."""
    with tarfile.open(shard) as archive:
        return sum(member.name.rpartition(".")[2].lower() == "cls" for member in archive)


def _process() -> tuple[int, int]:
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)
