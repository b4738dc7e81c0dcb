"""Images of one's own, before any is opened: which files there are, of which class, and in which part of the data.

They lie in class folders, in ROOT/CLASS/… or in ROOT/PART/CLASS/…, or stand in a table `path,label[,split]`, where an
image may have several labels: `cat;dog`.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple, NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from kw_lightning.errors import RunError, did_you_mean, listed, mistake, sentence
from kw_lightning.paths import shortened
from kw_lightning.recipe.scalars import is_unicode

TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of tables, and what stands between their columns where it is in the first line; else it is found there."""
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
"""The parts of a data set, and what folders and tables call them."""
_SHOWN = 5
"""Rows that a message about a table counts up."""


SEPARATORS = (";", "|")
"""What is taken for the separator of several labels where none is said; a comma is part of many a class's name."""


class Entry(NamedTuple):
    """An image file, the name of its class (or of its classes, in one text) and its part; "" where no part is said."""

    file: str
    label: str
    part: str = ""


@dataclass(frozen=True)
class Listing:
    """The images of a folder or a table.

    Attributes:
        source: the folder or the table, for messages.
        entries: the images, in the order of the classes' folders or of the table's rows.
        names: part → what the data calls it, as the folder's name.
        empty: class folders without an image.
        passed_over: files in class folders that do not end as images do.
        separator: what stands between several labels of an image; None where an image has one.
    """

    source: Path
    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    empty: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    separator: str | None = None

    def part(self, name: str) -> list[Entry]:
        """Return the images of a part; those of no part train."""
        return [entry for entry in self.entries if (entry.part or "train") == name]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes of the training images in order; by their value where all are whole numbers."""
        labels = self.counts("train").keys()
        return tuple(sorted(labels, key=(lambda label: (int(label), label)) if all(map(_is_number, labels)) else str))

    def labels(self, entry: Entry) -> tuple[str, ...]:
        """Return the classes of an image."""
        return tuple(filter(None, entry.label.split(self.separator))) if self.separator else (entry.label,)

    def counts(self, part: str) -> Counter[str]:
        """Return how many images of a part each class has."""
        return Counter(label for entry in self.part(part) for label in self.labels(entry))


def list_images(source: Path) -> Listing:
    """Return the images of a folder of class folders, or of a table, which may give an image several labels.

    Raises:
        RunError: neither is there, **or** mistakes in a table.
    """
    return list_table(source, separator=separator_of(source)) if source.is_file() else list_folder(source)


def list_folder(root: Path, given: Mapping[str, str] | None = None, *, training: bool = True) -> Listing:
    """Return the images of ROOT/PART/CLASS/…, or of ROOT/CLASS/… where there is no folder of training images.

    Args:
        root: the folder.
        given: part → its folder's name, where it is not one of `PARTS`.
        training: whether training images are needed; evaluation does without, if another part is there.

    Raises:
        RunError: no such folder, one that cannot be read, no images in class folders, **or** a class whose name no file
            could hold.
    """
    given = given or {}
    folders: dict[str, str] = {}
    for part, usual in PARTS.items():
        names = (given[part],) if part in given else usual
        there = [name for name in names if (root / name).is_dir()]
        folders |= {part: there[0]} if there else {}
    if "train" not in folders and (training or not folders):
        missing = [name for part, name in given.items() if part not in folders]
        if missing:
            raise RunError(f"data: {root / missing[0]} holds no images in class folders: {_missing(root)}")
        folders = {"": "."}
    entries: list[Entry] = []
    empty: list[str] = []
    passed_over: list[str] = []
    for part, name in folders.items():
        found = _class_folders(root / name)
        if not found and part == "test" and part not in given:  # without labels, as ImageNet's
            continue
        if not found:
            reason = "no folders in it" if (root / name).is_dir() else _missing(root)
            raise RunError(f"data: {root / name} holds no images in class folders: {reason}")
        for folder in found:
            if not is_unicode(folder.name):
                raise RunError(f"data: {folder}: found a class with a name that is no text in UTF-8; rename the folder")
            with _readable():
                files = files_under(folder)
            images = [file for file in files if file.lower().endswith(IMG_EXTENSIONS)]
            entries += [Entry(file, _composed(folder.name), part) for file in images]
            passed_over += [file for file in files if not file.lower().endswith(IMG_EXTENSIONS)]
            empty += [str(folder)] if not images else []
    if not entries or (training and not any((entry.part or "train") == "train" for entry in entries)):
        raise RunError(f"data: {root / folders.get('train', '')} holds no images in class folders: none in any of them")
    return Listing(root, tuple(entries), folders, tuple(empty), tuple(passed_over))


def separator_of(table: Path) -> str | None:
    """Return what seems to stand between several labels of a row; None where no row has several.

    Raises:
        RunError: a file that is no such table.
    """
    labels = {row["label"] or "" for _, row in rows_of(table)}
    return next((mark for mark in SEPARATORS if any(mark in label for label in labels)), None)


def list_table(table: Path, *, training: bool = True, separator: str | None = None) -> Listing:
    """Return the images of a table `path,label[,split]`; paths are relative to the table.

    Args:
        table: the file.
        training: whether training images are needed.
        separator: what stands between several labels of a row, which may then have none, too; None for one label.

    Raises:
        RunError: every kind of mistake in the table, in a line each, with the lines where it stands.
    """
    faults = _Faults(table)
    entries: list[Entry] = []
    first: dict[str, tuple[int, str]] = {}
    once = "label" if separator is None else f"row, with all its labels, as a{separator}b"
    for number, row in rows_of(table):
        if None in row.values() or None in row:
            faults.add(number, "another number of values than the first line has names")
            continue
        path, label = row["path"], _composed(row["label"])
        if separator is not None and label:
            label = separator.join(dict.fromkeys(filter(None, map(str.strip, label.split(separator)))))
        if not path or (not label and separator is None):
            faults.add(number, f"no {'path' if not path else 'label'}")
            continue
        part = _part(row.get("split") or "")
        if part is None:
            allowed = "train, val, test or nothing"
            names = [name for usual in PARTS.values() for name in usual]
            faults.add(number, mistake(row["split"], allowed, what="the split", names=names))
        file = str(table.parent / os.path.expanduser(path))
        if not _is_file(file):
            cure = "; write / between folders" if "\\" in path else ""
            faults.add(number, f"there is no file {shortened(file, 300)}{cure}", "files that are not there")
        before, other = first.setdefault(file, (number, label))
        if other != label:
            faults.add(number, f'{path} is "{label}" here and "{other}" in line {before}; an image has one {once}')
        elif before != number:
            faults.add(number, f"{path} stands in line {before} already", "images that stand there twice")
        entries.append(Entry(file, label, part or ""))
    faults.raise_any()
    if not entries or (training and not any((entry.part or "train") == "train" for entry in entries)):
        raise RunError(f"{table}: no row names an image to train with")
    used = {entry.part or "train" for entry in entries}
    found = Listing(table, tuple(entries), {part: part for part in PARTS if part in used}, separator=separator)
    if training and not found.classes:
        raise RunError(f"{table}: no image to train with has a label")
    if training and separator is None:
        _check_classes(table, found.counts("train"))
    return found


def _check_classes(table: Path, counts: Counter[str]) -> None:
    """Refuse labels that are measurements, which images do not share; decimal numbers as 4.5 stars are classes.

    Raises:
        RunError: they are.
    """
    measured = [label for label in counts if re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*(e[+-]?\d+)?", label, re.IGNORECASE)]
    if 2 * len(counts) > counts.total() and 2 * len(measured) > len(counts):
        found = (
            f"{len(measured):,} decimal numbers among the labels of {counts.total():,} images: {listed(measured, 3)}"
        )
        hint = "no network is trained to give numbers here; name a range each, as low, middle and high"
        raise RunError(f"{table}: {sentence(found, 'names of classes, of several images each', hint)}")


class _Faults:
    """Mistakes of a table: of each kind the first, and the lines where there are more."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.found: dict[str, tuple[str, list[int]]] = {}

    def add(self, line: int, message: str, kind: str = "") -> None:
        kind = kind or message.partition('"')[0]
        self.found.setdefault(kind, (message, []))[1].append(line)

    def raise_any(self) -> None:
        if not self.found:
            return
        lines = []
        for message, numbers in self.found.values():
            others = [str(number) for number in numbers[1:]]
            more = ", …" if len(others) > _SHOWN else ""
            also = f" ({len(others)} more such, line {', '.join(others[:_SHOWN])}{more})" if others else ""
            lines.append(f"{self.table}:{numbers[0]}: {message}{also}")
        raise RunError(*lines)


def rows_of(
    table: Path, needed: Sequence[str] = ("path", "label"), allowed: str = "path, label and, if you like, split"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a table, names of columns in small letters; lines count from 1.

    Args:
        table: the file.
        needed: columns that it must have.
        allowed: those that it may have, in words.

    Raises:
        RunError: a file that is no such table.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            marks = (TABLES.get(table.suffix.lower(), ","), ",", ";", "\t")
            reader = csv.DictReader(file, delimiter=next((mark for mark in marks if mark in head), ","))
            reader.fieldnames = names = [name.strip().lower() for name in reader.fieldnames or ()]
            for wanted in needed:
                if wanted not in names:
                    hint = did_you_mean(wanted, names).replace("did you mean", "is it")
                    found = sentence(", ".join(names) or "an empty file", allowed, hint)
                    raise RunError(f'{table}:1: the column "{wanted}" is missing: {found}')
                if names.count(wanted) > 1:
                    raise RunError(f'{table}:1: the column "{wanted}" stands there {names.count(wanted)} times')
            for row in reader:
                yield (
                    reader.line_num,
                    {key: value.strip() if isinstance(value, str) else value for key, value in row.items()},
                )
    except OSError as error:
        raise RunError(f"data: {table}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RunError(f"{table}: this is no text in UTF-8, as a table has to be") from None
    except csv.Error as error:
        raise RunError(f"{table}:{reader.line_num}: {error}") from None


def _part(name: str) -> str | None:
    """Return the part that a name means, "" for none, None for a name that is none."""
    name = name.lower()
    return next((part for part, names in PARTS.items() if name in names), None if name else "")


def _missing(root: Path) -> str:
    """Return that a folder is not there; a relative one may be elsewhere."""
    return "there is no such folder" + ("" if root.is_absolute() else f" in {Path.cwd()}")


def _class_folders(folder: Path) -> list[Path]:
    """Return the class folders in order; what systems and tools hide is none, and a link that leads nowhere is told."""
    if not folder.is_dir():
        return []
    with _readable():
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        shown = [entry for entry in entries if not entry.name.startswith((".", "__"))]
        return [folder / entry.name for entry in shown if S_ISDIR(entry.stat().st_mode)]


@contextmanager
def _readable() -> Iterator[None]:
    """Tell a folder that cannot be read: a class that is left out in silence is a network that does not know it."""
    try:
        yield
    except OSError as error:
        raise RunError(f"data: {error.filename}: {error.strerror}") from None


def files_under(folder: Path) -> list[str]:
    """Return the files under a folder, in the order of torchvision's ImageFolder, but for what is hidden.

    Links to folders are followed, but for those that lead back to one on the way to them.

    Raises:
        OSError: a folder that cannot be read.
    """
    found: list[tuple[str, list[str]]] = []
    for base, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if not (name.startswith(".") or _leads_back(Path(base, name)))]
        found.append((base, sorted(name for name in names if not name.startswith("."))))
    return [os.path.join(base, name) for base, names in sorted(found) for name in names]


def _raise(error: OSError) -> NoReturn:
    raise error


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.resolve() in {above.resolve() for above in folder.parents}


def _composed(label: str) -> str:
    """Return a class's name with letters and accents in one: macOS writes file names with both apart."""
    return unicodedata.normalize("NFC", label)


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a null character
        return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def rarest(labels: Sequence[Sequence[str]]) -> list[str]:
    """Return the class that each image is filed under where classes are told apart: its rarest; "" without any."""
    often = Counter(label for several in labels for label in several)
    return [min(several, key=lambda label: (often[label], label), default="") for several in labels]
