"""Keras's files: `.weights.h5`, and `.keras`, which holds one beside the model's JSON. Nothing in them is run."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kw_lightning.errors import RunError, first_line, needs
from kw_lightning.keras.importing.reading import MAX_JSON_BYTES

CONFIG = "config.json"
WEIGHTS = "model.weights.h5"
FLOATS = ("float16", "float32", "float64")


class WeightArchive:
    """An open file of weights.

    Attributes:
        file: its name for messages.
    """

    def __init__(self, file: str, content: Any) -> None:
        self.file, self._content = file, content

    def read(self, path: str, numbers: int) -> np.ndarray[Any, Any] | str:
        """Return a variable, or in words why it cannot be had; no more than so many numbers are ever unpacked."""
        import h5py

        place: Any = self._content
        for part in path.split("/"):
            # Keras before 3.7 begins the names of an attention's parts with a line.
            names = [name for name in (part, f"_{part}") if isinstance(place, h5py.Group) and name in place]
            # What links to another file is not followed.
            if not names or not isinstance(place.get(names[0], getlink=True), h5py.HardLink):
                return f"{path} is missing"
            place = place[names[0]]
        if not isinstance(place, h5py.Dataset) or place.external or place.is_virtual:
            return f"{path} holds no numbers of its own"
        if place.dtype.name not in FLOATS:
            return f"{path} is of type {place.dtype.name}, which is not read; {', '.join(FLOATS)} are"
        if place.size != numbers:
            return f"{path} is {list(place.shape)}, and the model has {numbers:,} numbers there"
        return np.asarray(place[()])


@contextmanager
def open_weights(path: Path) -> Iterator[WeightArchive]:
    """Open the weights of a `.weights.h5` or `.keras` file.

    Raises:
        RunError: h5py is not installed, **or** a file that is not there, damaged, or not of Keras 3.
    """
    try:
        import h5py
    except ImportError as error:
        raise RunError(needs(f"{path}: a file of Keras", "h5py", "keras-import", error)) from None
    source: Any = io.BytesIO(_member(path, WEIGHTS, None)) if path.suffix == ".keras" else path
    try:
        content = h5py.File(source, "r")
    except OSError as error:
        raise RunError(f"{path}: cannot be read as Keras's weights: {first_line(error)}") from error
    with content:
        if "layers" not in content:
            raise RunError(f"{path}: holds no weights of a Sequential or Functional model as Keras 3 writes them")
        try:
            yield WeightArchive(str(path), content)
        except (OSError, KeyError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{path}: damaged: {first_line(error)}") from error


def model_json(path: Path) -> bytes:
    """Return the JSON of a model: a file of it, or the part of a `.keras` file.

    Raises:
        RunError: a file that is not there, **or** damaged.
    """
    if path.suffix == ".keras":
        return _member(path, CONFIG, MAX_JSON_BYTES)
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error


def _member(path: Path, name: str, most: int | None) -> bytes:
    """Return a part of a `.keras` file; Keras packs nothing, so a part is never larger than its file."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(name).file_size
            if size > (path.stat().st_size if most is None else most):
                raise RunError(f"{path}: {name} has {size:,} bytes, more than are read")
            return archive.read(name)
    except KeyError:
        raise RunError(f"{path}: has no {name}; Keras 3 writes one") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise RunError(f"{path}: not a file of Keras, or a damaged one: {first_line(error)}") from error
