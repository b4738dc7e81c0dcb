"""The images that a prediction is asked for: found by name, read, and put together in batches of one size."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kw_lightning.errors import KWError, RunError, first_line, kind, sentence
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.data.listing import TABLES, files_under, rows_of
from kw_lightning.fit.data.transforms import evaluation_transform
from kw_lightning.paths import user_path
from kw_lightning.preprocessing import Preprocessing

ImageInput = str | Path | Image.Image | Tensor
Sample = tuple[int, Tensor | str]
"""An image's place in the list, and the image as the network takes it [channels, height, width] or what is wrong."""


def find_images(names: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the image files that names mean, in their order, those of a folder sorted.

    Args:
        names: one or more, of files, folders (searched below too, but for what is hidden), globs (`**` for any
            folders), or tables (`.csv`, `.tsv`) with a column `path`, relative to the table. A file that is named is
            taken whatever its ending.

    Raises:
        RunError: a name that means no image, all such names at once, **or** a file that is no such table.
    """
    found: list[Path] = []
    faults = []
    for name in [names] if isinstance(names, str | Path) else names:
        path = user_path(name)
        try:
            if path.is_dir():
                files = sorted(file for file in map(Path, files_under(path)) if _is_image(file))
            elif path.suffix.lower() in TABLES and path.is_file():
                files = _listed(path)
            elif path.is_file():
                files = [path]
            else:
                files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        except OSError as error:
            faults.append(f"{error.filename or path}: {error.strerror or error}")
            continue
        if not files:
            there = "no image in this folder" if path.is_dir() else "no such file, and no file matches it"
            faults.append(f"{path}: {there}")
        found += files
    if faults:
        raise RunError(*faults)
    return found


class Images(Dataset[Sample]):
    """Images by their place in a list, ready for the network; what cannot be read is a text that says why."""

    def __init__(self, images: Sequence[ImageInput], preprocessing: Preprocessing) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.transform = evaluation_transform(preprocessing)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        source = self.images[index]
        try:
            image = source if isinstance(source, Tensor) else self._in_colours(source)
            ready: Tensor = self.transform(image)
        except (KWError, OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
            return index, first_line(error)
        return index, ready

    def _in_colours(self, source: str | Path | Image.Image) -> Image.Image:
        """Return a picture with as many channels as the network takes."""
        image = source if isinstance(source, Image.Image) else read_image(str(source))
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(self.preprocessing.channels or 3, image.mode)
        return image if image.mode == mode else image.convert(mode)


def check_images(images: Sequence[ImageInput], channels: int | None) -> None:
    """Refuse what can be no image whatever a file holds, as an array.

    Args:
        images: a path, a PIL image or a tensor each.
        channels: of a tensor; None where any number will do.

    Raises:
        TypeError: something else, **or** a tensor of whole numbers that are no bytes.
        ValueError: a tensor of another shape than [channels, height, width].
    """
    for image in images:
        if not isinstance(image, ImageInput):
            hint = "PIL.Image.fromarray(array) makes one of an array" if hasattr(image, "__array__") else ""
            allowed = "a path, a PIL image, a tensor [channels, height, width], or a list of such"
            raise TypeError(sentence(f"{kind(image)} in the place of an image", allowed, hint))
        if not isinstance(image, Tensor):
            continue
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(sentence(f"an image in {image.dtype}", "torch.uint8, or floating point from 0 to 1"))
        if image.dim() != 3 or channels not in (None, len(image)):
            allowed = f"[{'channels' if channels is None else channels}, height, width]"
            hint = "a batch is given as list(images)" if image.dim() == 4 else ""
            raise ValueError(sentence(f"an image of the shape {list(image.shape)}", allowed, hint))


def in_batches(samples: Sequence[Sample]) -> tuple[dict[int, str], list[tuple[list[int], Tensor]]]:
    """Return what is wrong by place, and (places, batch [images, channels, height, width]) for each size of image."""
    problems: dict[int, str] = {}
    sizes: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for index, image in samples:
        if isinstance(image, str):
            problems[index] = image
        else:
            sizes.setdefault(tuple(image.shape), []).append((index, image))
    batches = [([index for index, _ in group], torch.stack([image for _, image in group])) for group in sizes.values()]
    return problems, batches


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and path.is_file()


def _listed(table: Path) -> list[Path]:
    return [
        table.parent / Path(row["path"]).expanduser() for _, row in rows_of(table, ("path",), "path") if row["path"]
    ]
