"""Data sets of Hugging Face's `datasets`: from the Hub, or from a folder. None of their code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset

from kw_lightning.errors import RunError, first_line, listed, mistake, needs
from kw_lightning.fit.data.files import Target
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.data.listing import PARTS
from kw_lightning.paths import user_path

PREFIX = "hf/"
"""Begins the name of such a data set in a recipe."""


class HuggingFaceImages(Dataset[tuple[Any, Target]]):
    """Rows of a table with a column of images, and their classes.

    Attributes:
        rows: the table, its images not decoded.
        column: of the images.
        targets: the class of each row.
        name: of the data set, for messages.
    """

    def __init__(self, rows: Any, column: str, targets: Sequence[Target], name: str) -> None:
        self.rows = rows
        self.column = column
        self.targets = list(targets)
        self.name = name

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        image = self.rows[index][self.column]
        if image is None:
            raise RunError(f"{self.name}, row {index}: no image")
        path = image["path"] or f"{self.name}, row {index}"
        return read_image(path, image["bytes"]), self.targets[index]


def open_parts(
    name: str,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str | None = None,
    evaluation: str | None = None,
    test: str | None = None,
    *,
    several: bool = False,
) -> tuple[dict[str, HuggingFaceImages], tuple[str, ...]]:
    """Return the parts that a data set has, by name, and the names of the classes.

    Args:
        name: of the data set on the Hub, or a folder.
        config: of the data set, where it has several.
        image, label: columns; found by their type where they are not given.
        train, evaluation, test: splits; found by their usual names.
        several: whether a row has a list of labels.

    Raises:
        RunError: the extra `hf` is not installed, no such data, columns or splits that are not there, **or** classes
            of another part that training does not have.
    """
    splits = _load(name, config)
    training = _split(name, splits, "train", train)
    others = {part: _split(name, splits, part, given) for part, given in (("validation", evaluation), ("test", test))}
    if training is None:
        raise RunError(f"data: {name}: no split to train with; found {', '.join(splits)}; name one by data.args.train")
    columns = training.features
    image = _column(name, "image", image, columns, lambda kind: type(kind).__name__ == "Image")
    label = _column(name, "label", label, columns, lambda kind: type(_inside(kind, several)).__name__ == "ClassLabel")
    if hasattr(columns[label], "feature") != several:
        found, other = ("one", "several") if several else ("several", "one")
        raise RunError(f"data: {name}: {label} has {found} to a row, and data.labels is {other}")
    values = getattr(_inside(columns[label], several), "names", None)
    order = list(range(len(values))) if values else sorted(set(_single(training[label], several)))
    numbers = {value: number for number, value in enumerate(order)}
    from datasets import Image

    parts = {}
    for part, rows in {"train": training, **others}.items():
        if rows is None or not len(rows):
            continue
        unknown = sorted({str(value) for value in _single(rows[label], several)} - {str(value) for value in order})
        if unknown:
            raise RunError(f"data: {name}: labels of {part} that are no class of training: {listed(unknown)}")
        undecoded = rows.cast_column(image, Image(decode=False)).select_columns([image])
        targets = [_target(value, numbers) for value in rows[label]]
        parts[part] = HuggingFaceImages(undecoded, image, targets, name)
    return parts, tuple(map(str, values or order))


def _inside(kind: Any, several: bool) -> Any:
    """Return the type of a label, which of several labels is that of a list's values."""
    return getattr(kind, "feature", None) if several else kind


def _single(labels: Iterable[Any], several: bool) -> Iterable[Any]:
    return chain.from_iterable(labels) if several else labels


def _target(label: Any, numbers: Mapping[Any, int]) -> Target:
    if not isinstance(label, list):
        return numbers[label]
    target = torch.zeros(len(numbers))
    target[[numbers[value] for value in label]] = 1
    return target


def _load(name: str, config: str | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise RunError(needs(f'data: "{PREFIX}{name}"', "datasets", "hf", error)) from None
    folder = user_path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as error:  # whatever a library makes of a name, a network or a stranger's files
        raise RunError(f"data: {name} cannot be read: {first_line(error)}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _split(name: str, splits: dict[str, Any], part: str, given: str | None) -> Any:
    if given is not None and given not in splits:
        raise RunError(f"data: {name}: " + mistake(given, splits, what="the unknown split"))
    wanted = (given,) if given is not None else PARTS[part]
    return next((splits[split] for split in wanted if split in splits), None)


def _column(name: str, what: str, given: str | None, columns: dict[str, Any], fits: Callable[[Any], bool]) -> str:
    """Return the column that is given, else the only one of the type, else the one that is called so."""
    if given is not None and given not in columns:
        raise RunError(f"data: {name}: " + mistake(given, columns, what="the unknown column"))
    fitting = [column for column, kind in columns.items() if fits(kind)]
    found = given or (fitting[0] if len(fitting) == 1 else what)
    if found not in columns:
        raise RunError(f"data: {name}: which column is the {what}? Say it by data.args.{what}: {', '.join(columns)}")
    return found
