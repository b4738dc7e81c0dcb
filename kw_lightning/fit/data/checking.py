"""Every image opened once, before a training of many hours meets the one that cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from kw_lightning.errors import RunError
from kw_lightning.fit.data.images import read_image
from kw_lightning.fit.data.listing import Listing

BITS = {"I;16": 16, "I;16B": 16, "I;16L": 16, "I;16N": 16, "I": 16}


@dataclass(frozen=True)
class Checked:
    """What opening every image found.

    Attributes:
        images: how many there are.
        broken: a line for each file that cannot be read, and why.
        empty: a line for each class folder without images.
        odd: a line for each image that is read, but is of other channels than most, or of 16 bits; and for files that
            are passed over.
    """

    images: int
    broken: tuple[str, ...]
    empty: tuple[str, ...]
    odd: tuple[str, ...]


def check_images(listing: Listing, advance: Callable[[], object] = lambda: None) -> Checked:
    """Open every image of a listing, in threads.

    Args:
        listing: the images.
        advance: called after each image.
    """
    files = list(dict.fromkeys(entry.file for entry in listing.entries))
    broken: list[str] = []
    modes: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for file, (mode, reason) in zip(files, threads.map(_open, files), strict=True):
            if reason is not None:
                broken.append(reason)
            else:
                modes[file] = mode
            advance()
    usual = Counter(_channels(mode) for mode in modes.values()).most_common(1)
    odd = []
    for file, mode in modes.items():
        if mode in BITS:
            odd.append(f"{file}: 16 bits a channel; scaled to 8")
        elif _channels(mode) != usual[0][0]:
            count, most = _channels(mode), usual[0][0]
            odd.append(f"{file}: {count} channel{'s' * (count > 1)} ({mode}), most images have {most}; read as RGB")
    odd += [f"{file}: does not end as images do; passed over" for file in listing.passed_over]
    empty = tuple(f"{folder}: a class without images" for folder in listing.empty)
    return Checked(len(files), tuple(broken), empty, tuple(odd))


def _open(file: str) -> tuple[str, str | None]:
    """Return the mode of an image and, where it cannot be read, the line that says why."""
    try:
        read_image(file)
        with Image.open(file) as image:
            return image.mode, None
    except RunError as error:
        return "", str(error)
    except OSError as error:  # it was there a moment ago
        return "", f"{file}: {error}"


def _channels(mode: str) -> int:
    """Return the channels of an image as it is seen: a palette's are those of its colours."""
    return 3 if mode == "P" else len(Image.new(mode, (1, 1)).getbands())
