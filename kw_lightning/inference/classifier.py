"""A trained network that takes images and answers in class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kw_lightning.errors import RunError, argument, first_line, mistake
from kw_lightning.fit.failures import readable_failures, silent
from kw_lightning.inference import hub
from kw_lightning.inference.card import model_card
from kw_lightning.inference.images import ImageInput, Images, check_images, in_batches
from kw_lightning.inference.prediction import Prediction
from kw_lightning.inference.saving import SavedNetwork, read_folder, write_folder
from kw_lightning.nn.finishing import add_epilogues


class ImageClassifier(nn.Module):
    """A network with its preprocessing and class names; `kw_lightning.load` makes one.

    Args:
        saved: the network, its recipe, preprocessing and class names.

    Attributes:
        saved: the same.
        network: images [batch, channels, height, width], preprocessed, to logits [batch, classes].

    Example:
        >>> model = kw_lightning.load("runs/pets-1")
        >>> model.predict("cat.jpg").label
        'cat'
    """

    def __init__(self, saved: SavedNetwork) -> None:
        super().__init__()
        self.saved = saved
        self.network = saved.network
        add_epilogues(self.network)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the network's outputs, in their order."""
        return self.saved.classes

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of preprocessed images [batch, channels, height, width]."""
        logits: Tensor = self.network(images)
        return logits

    @overload
    def predict(  # type: ignore[overload-overlap] # a text is a sequence of texts, too
        self,
        images: ImageInput,
        *,
        top: int = ...,
        threshold: float = ...,
        batch_size: int = ...,
        workers: int = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: Sequence[ImageInput],
        *,
        top: int = ...,
        threshold: float = ...,
        batch_size: int = ...,
        workers: int = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        top: int = 5,
        threshold: float = 0.0,
        batch_size: int = 32,
        workers: int = 0,
    ) -> Prediction | list[Prediction]:
        """Return what the network says of images, whatever mode it is in.

        Args:
            images: a path, a PIL image, a tensor [channels, height, width] (uint8, or floating point from 0 to 1), or
                a list of such.
            top: how many classes to name, the likeliest first.
            threshold: least score of a class that is named, from 0 to 1.
            batch_size: images that run together; no result depends on it.
            workers: processes that read images.

        Returns:
            A `Prediction` of one image, a list of them of a list, in its order. An image that cannot be read gives
            one with a `problem` and without classes.

        Raises:
            TypeError: what is no image, as an array, **or** a tensor of whole numbers that are no bytes.
            ValueError: a tensor of another shape, **or** a `top` under 1.
        """
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            return list(self.stream(images, top=top, threshold=threshold, batch_size=batch_size, workers=workers))
        return next(self.stream([images], top=top, threshold=threshold, batch_size=1, workers=0))

    def stream(
        self,
        images: Sequence[ImageInput],
        *,
        top: int = 5,
        threshold: float = 0.0,
        batch_size: int = 32,
        workers: int = 0,
        advance: Callable[[int], object] = lambda count: None,
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image, in order; see `predict`.

        Args:
            advance: called with the number of images that were just done.

        Raises:
            RunError: memory that is too small, **or** a process that was ended while it read images.
            TypeError, ValueError: as `predict`, before the first prediction.
        """
        if top < 1:
            raise ValueError(mistake(top, "a number of at least 1", what="top"))
        check_images(images, self.saved.preprocessing.channels)
        loader = DataLoader(
            Images(images, self.saved.preprocessing),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=in_batches,
            worker_init_fn=silent,
        )
        with _evaluating(self.network), _enough_memory():
            for problems, batches in loader:
                scores: dict[int, Tensor] = {}
                for indices, batch in batches:
                    found = self._scores(batch)
                    if isinstance(found, str):
                        problems |= dict.fromkeys(indices, found)
                    else:
                        scores.update(zip(indices, found, strict=True))
                failed = (index for index, values in scores.items() if not values.isfinite().all())
                problems |= dict.fromkeys(failed, "the network's answer is infinite or not a number")
                done = sorted({*problems, *scores})
                for index in done:
                    source = images[index]
                    path = str(source) if isinstance(source, str | Path) else None
                    if index in problems:
                        yield Prediction(path=path, problem=problems[index])
                    else:
                        yield Prediction(self._named(scores[index], top, threshold), path)
                advance(len(done))

    @torch.no_grad()
    def _scores(self, images: Tensor) -> Tensor | str:
        """Return the scores [batch, classes] in float32 on the CPU, or why the network does not take such images."""
        place = next(self.network.parameters(), torch.empty(0))
        try:
            with _enough_memory():
                logits = self(images.to(place.device, place.dtype)).float()
        except RunError:  # memory that is too small is no fault of the images
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            cure = "" if self.saved.preprocessing.channels else "; give model.input in its recipe"
            return f"the network does not take an image of {list(images.shape[1:])}: {first_line(error)}{cure}"
        return (logits.sigmoid() if self.saved.several else logits.softmax(dim=1)).cpu()

    def _named(self, scores: Tensor, top: int, threshold: float) -> tuple[tuple[str, float], ...]:
        values, indices = scores.topk(min(top, len(scores)))
        named = zip(indices.tolist(), values.tolist(), strict=True)
        return tuple((self.classes[index], value) for index, value in named if value >= threshold)

    def save_pretrained(
        self, folder: str | Path, *, metrics: Mapping[str, Any] | None = None, eight_bits: bool = False
    ) -> None:
        """Write the folder that `kw_lightning.load` reads: safetensors, recipe, preprocessing, class names, card.

        Args:
            folder: made if it is not there.
            metrics: what the card says that was measured, by part of the data, as `{"test": {"accuracy": 0.97}}`.
            eight_bits: write cells, attention and other matrices in eight bits: a quarter of the size, and rounded.

        Raises:
            RunError: the folder cannot be written.
            TypeError: metrics of no part of the data.
        """
        write_folder(self.saved, Path(folder), model_card(self.saved, metrics or {}), eight_bits=eight_bits)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        allow_python: Sequence[str] = (),
        **options: Any,
    ) -> ImageClassifier:
        """Read a saved network from a folder or from the Hugging Face Hub.

        Args:
            name_or_folder: a folder, or `organisation/name` on the Hub.
            revision: branch, tag or commit on the Hub.
            allow_python: packages whose code the recipe may name.
            **options: of `huggingface_hub.snapshot_download`, as `token`, `cache_dir`, `local_files_only`.

        Raises:
            RunError: no such network, **or** one that was changed or is damaged.
            RecipeError: a recipe that cannot be used here.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            name, given = hub.split_name(str(name_or_folder))
            folder = hub.fetch(name, revision or given, **options)
        elif options:
            raise RunError(f"{folder} is a folder: {', '.join(sorted(options))} go with a name on the Hub")
        return cls(read_folder(folder, allow_python=allow_python))

    def push_to_hub(self, repository: str, *, metrics: Mapping[str, Any] | None = None, **options: Any) -> str:
        """Upload the network to the Hugging Face Hub and return the address of the commit.

        Args:
            repository: `organisation/name`, made if it is not there.
            metrics: see `save_pretrained`.
            **options: `private`, and those of `huggingface_hub.HfApi.upload_folder`, as `commit_message`, `token`.

        Raises:
            RunError: huggingface_hub is not installed, **or** the Hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics)
            return hub.push(Path(folder), repository, **options)


def _enough_memory() -> AbstractContextManager[None]:
    smaller = f"make {argument('batch_size')} or {argument('workers')} smaller"
    return readable_failures(smaller, smaller)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
