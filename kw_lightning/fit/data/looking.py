"""A look at images of one's own: how many, of which classes, how large, in which colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from kw_lightning.errors import times
from kw_lightning.fit.data.listing import Listing

LOOKED_AT = 500
"""Images whose heads are read, evenly chosen; more would not change what is found."""
UNEQUAL = 3
"""How many times as many images the largest class has, as the smallest, before it is said."""
_NAMED = 5
COLOURS = {"RGB": "colour", "L": "grey", "1": "black and white", "P": "palette", "RGBA": "with transparency"}


@dataclass(frozen=True)
class Look:
    """What a look at a listing found.

    Attributes:
        listing: the images.
        sizes: (width, height) of those looked at.
        modes: how many are of which of PIL's modes.
        unread: files that are no images.
    """

    listing: Listing
    sizes: tuple[tuple[int, int], ...]
    modes: Counter[str]
    unread: tuple[str, ...]

    @property
    def shorter_side(self) -> int:
        """Return the median of the images' shorter sides, in pixels; 0 where no image could be read."""
        return int(median(min(size) for size in self.sizes)) if self.sizes else 0

    @property
    def unequal(self) -> bool:
        """Tell whether the classes have so different numbers of training images that it is to be said."""
        counts = self.listing.counts("train").values()
        return max(counts) > UNEQUAL * min(counts)

    def lines(self) -> list[str]:
        """Return what was found, for people."""
        listing, classes = self.listing, self.listing.classes
        named = ", ".join(classes[:_NAMED]) + (", …" if len(classes) > _NAMED else "")
        parts = {part: len(listing.part(part)) for part in ("train", "validation", "test")}
        told = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count)
        found = [
            f"{listing.source}: {_number(len(listing.entries), 'image')}, {_number(len(classes), 'class')}: {named}"
        ]
        found.append(f"parts: {told}" + ("" if parts["validation"] else "; a tenth of training validates"))
        if self.sizes:
            small, large = min(self.sizes, key=_area), max(self.sizes, key=_area)
            sizes = times(small) + ("" if small == large else " to " + times(large))
            modes = ", ".join(f"{count:,} {COLOURS.get(mode, mode)}" for mode, count in self.modes.most_common())
            found.append(
                f"looked at {len(self.sizes):,}: {sizes} pixels, shorter side mostly {self.shorter_side}; {modes}"
            )
        if listing.separator:
            several = sum(len(listing.labels(entry)) for entry in listing.entries) / len(listing.entries)
            found.append(f'several labels an image, separated by "{listing.separator}": {several:.1f} on average')
        ordered = listing.counts("train").most_common()
        (most, highest), (least, lowest) = ordered[0], ordered[-1]
        equal = f"classes: {_number(highest, 'image')} of {most}, {lowest:,} of {least}"
        found.append(equal + (f": unequal, {highest / lowest:.1f} times" if self.unequal else ""))
        endings = Counter(Path(file).suffix.lower() or "without an ending" for file in listing.passed_over)
        if endings:
            counted = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(_NAMED))
            found.append(f"passed over, since they do not end as images do: {counted}")
        found += [f"no images in {folder}" for folder in listing.empty[:_NAMED]]
        found += [f"no image: {file}" for file in self.unread[:_NAMED]]
        return found


def look(listing: Listing) -> Look:
    """Read the heads of some of the images."""
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    unread = []
    for file in _evenly([entry.file for entry in listing.entries], LOOKED_AT):
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
                modes[image.mode] += 1
        except Exception:  # whatever a decoder makes of a stranger's bytes
            unread.append(file)
    return Look(listing, tuple(sizes), modes, tuple(unread))


def _evenly(files: Sequence[str], count: int) -> list[str]:
    step = max(1, len(files) / count)
    return [files[int(index * step)] for index in range(min(count, len(files)))]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
