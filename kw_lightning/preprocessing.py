"""What an image goes through before the network sees it in evaluation; it belongs to the weights.

Where a recipe says nothing, mean, std, size, crop share and interpolation are the backbone's own: those of
torchvision's `weights.transforms()` and of timm's `pretrained_cfg`; ImageNet's for other networks with three channels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kw_lightning.errors import shown
from kw_lightning.recipe.types import Data, Model, Recipe

log = logging.getLogger(__name__)

PREPROCESSING, CLASSES = "preprocessing", "classes"
"""Keys of a checkpoint: what `Preprocessing.to_dict` gives, and the names of the network's outputs."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZED = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "fake": None}
"""Data sets whose images all have one size, and its side: it is kept, unless pretrained weights want another."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
GREY = {"digits", "mnist", "fashion_mnist"}
"""Data sets whose images have one channel."""
_GEOMETRY = ("resize", "crop")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a sample [channels, size, size] in evaluation.

    Attributes:
        mean, std: of each channel, of values from 0 to 1; None where nothing is normalised.
        size: side of the image that the network sees, in pixels; None where images keep their size.
        resize: length of the shorter side before the crop, in pixels; None where nothing is scaled before it.
        crop: "center"; "squash" scales both sides to `resize`, then crops; "none" scales both sides to `size`.
        interpolation: how an image is scaled, in torchvision's words.
        source: where these values come from, for people.
        channels: of the sample; an image of another number is turned to grey or to colour. None where it is not known.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    resize: int | None = None
    crop: str = "none"
    interpolation: str = "bilinear"
    source: str = ""
    channels: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for checkpoints and JSON."""
        data = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Return what `to_dict` wrote.

        Raises:
            ValueError: data that `to_dict` does not write, as from a damaged file or a stranger's.
        """
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        for key, value in values.items():
            if key not in _READ or not _READ[key](value):
                raise ValueError(f"{shown(key)} cannot be {shown(value)} in the preprocessing of an image")
        return cls(**values)

    def for_size(self, size: int) -> Preprocessing:
        """Return the same for images of another size, with the same share of them in the crop."""
        if self.size is None or size == self.size:
            return replace(self, size=size)
        return replace(self, size=size, resize=None if self.resize is None else size * self.resize // self.size)

    def describe(self) -> str:
        """Return it in words, without its source."""
        parts = []
        if self.crop == "center":
            scaled = f"shorter side {self.resize}, " if self.resize else ""
            parts.append(f"{self.interpolation}, {scaled}centre {self.size}")
        elif self.size is not None:
            scaled = f"both sides {self.resize}, centre " if self.resize not in (None, self.size) else "both sides "
            parts.append(f"{self.interpolation}, {scaled}{self.size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                parts.append(f"{name} {', '.join(f'{value:.4g}' for value in values)}")
        return "; ".join(parts) or "nothing"


def _is_side(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value <= 10_000)


def _is_row(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(isinstance(part, int | float) for part in value))


_READ: dict[str, Callable[[Any], bool]] = {
    "mean": _is_row,
    "std": _is_row,
    "size": _is_side,
    "resize": _is_side,
    "crop": lambda value: value in ("none", "center", "squash"),
    "interpolation": lambda value: value in INTERPOLATIONS,
    "source": lambda value: isinstance(value, str),
    "channels": _is_side,
}
_USUAL = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 224, 256, "center", "bilinear", "ImageNet's usual values", 3)


def own_preprocessing(recipe: Recipe) -> Preprocessing | None:
    """Return what the weights of a recipe's backbone were trained with; nothing is built or fetched for it.

    Returns:
        ImageNet's usual values for other networks of images with three channels; no mean and std for other numbers of
        channels; None where no network of images is named, and for tasks that have their own ways, as detection.
    """
    model = recipe.model
    if model is None or (model.input is not None and len(model.input) != 3):
        return None
    library, _, name = (model.backbone or "").partition("/")
    own: Preprocessing | None = _USUAL
    if library == "torchvision":
        own = _of_torchvision(name, model)
    elif library == "timm":
        own = _of_timm(name, model)
    elif model.input is None:
        return None
    if own is None:
        return None
    channels = model.args.get("in_chans", model.input[0] if model.input else 3)
    own = replace(own, channels=channels)
    if own.mean is not None and channels != len(own.mean):
        own = replace(own, mean=None, std=None)
    size = model.input[-1] if model.input else model.args.get("img_size", model.args.get("image_size"))
    return own.for_size(size) if isinstance(size, int) and size > 0 else own


def resolved_section(recipe: Recipe, section: str) -> dict[str, Any]:
    """Return `data.train` or `data.eval` with what it leaves open filled in from the backbone's own values.

    Evaluation takes mean, std, size and interpolation from training where it says nothing about them.
    """
    assert recipe.data is not None
    options: dict[str, Any] = dict(recipe.data.train if section == "train" else recipe.data.eval)
    if section == "eval":
        for key in ("mean", "std", "size", "interpolation"):
            if key in recipe.data.train:
                options.setdefault(key, recipe.data.train[key])
    own = own_preprocessing(recipe)
    if own is None:
        return options
    options.setdefault("interpolation", own.interpolation)
    if own.mean is not None and recipe.data.name not in GREY and not {"mean", "std"} & options.keys():
        options |= {"mean": list(own.mean), "std": list(own.std or ())}
    pretrained = recipe.model is not None and bool(recipe.model.pretrained)
    if own.size is not None and (pretrained or recipe.data.name not in SIZED):
        options.setdefault("size", own.size)
    if "size" in options and not options.keys() & set(_GEOMETRY):
        fitting = own.for_size(options["size"])
        options |= {"crop": fitting.crop} | ({"resize": fitting.resize} if fitting.resize else {})
    return options


def preprocessing(recipe: Recipe) -> Preprocessing | None:
    """Return what evaluation does to an image: the recipe's values, and the backbone's own where it says nothing.

    A random crop in evaluation is given as the centre one. Images of other places than a data set of one size are
    scaled to that size. None where neither is known.
    """
    own = own_preprocessing(recipe)
    if recipe.data is None or recipe.data.name.startswith("python:"):
        return own
    options = resolved_section(recipe, "eval")
    crop = options.get("crop", "none")
    chosen = Preprocessing(
        mean=tuple(options["mean"]) if "mean" in options and "std" in options else None,
        std=tuple(options["std"]) if "mean" in options and "std" in options else None,
        size=options.get("size"),
        resize=options.get("resize"),
        crop="center" if crop.startswith("random") else crop,
        interpolation=options.get("interpolation", "bilinear"),
        channels=own.channels if own is not None else _channels(recipe.data),
    )
    size = None if chosen.resize else SIZED.get(recipe.data.name)
    return replace(chosen, source=_source(recipe, chosen, own), size=chosen.size or size)


def _channels(data: Data) -> int:
    """Return the channels of a data set's images; files are read as RGB."""
    if data.name == "fake" and "shape" in data.args:
        return int(data.args["shape"][0])
    return 1 if data.name in GREY else 3


def contradictions(recipe: Recipe) -> list[str]:
    """Return where a recipe prepares images in another way than its pretrained weights were trained with, a line each.

    A published training may want that; whoever fine-tunes rarely does.
    """
    own, chosen = own_preprocessing(recipe), preprocessing(recipe)
    if recipe.model is None or not recipe.model.pretrained or own is None or chosen is None:
        return []
    if own.source == _USUAL.source:  # a guess, not what the weights were trained with
        return []
    found = []
    for key in _KEYS:
        theirs, ours, place = getattr(own, key), getattr(chosen, key), _place(recipe, key)
        if place is not None and not _alike(theirs, ours):
            found.append(
                f"{place} is {_shown(ours)}, and the weights were trained with {_shown(theirs)} ({own.source})"
            )
    return found


def warn_of_contradictions(recipe: Recipe) -> None:
    """Log `contradictions` as warnings."""
    for line in contradictions(recipe):
        log.warning("%s", line)


_KEYS = ("size", "resize", "crop", "interpolation", "mean", "std")


def _source(recipe: Recipe, chosen: Preprocessing, own: Preprocessing | None) -> str:
    used = [key for key in _KEYS if getattr(chosen, key) is not None and (chosen.size or key in ("mean", "std"))]
    said = [key for key in used if _place(recipe, key) is not None]
    sources = [own.source] if own is not None and len(said) < len(used) else []
    if said:
        sources.append(f"{' and '.join(filter(None, (', '.join(said[:-1]), said[-1])))} from the recipe")
    return "; ".join(sources)


def _place(recipe: Recipe, key: str) -> str | None:
    """Return the key path by which a recipe sets a value of evaluation, None where it does not."""
    if recipe.data is None:
        return None
    if key in recipe.data.eval:
        return f"data.eval.{key}"
    return f"data.train.{key}" if key in recipe.data.train and key not in _GEOMETRY else None


def _alike(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return len(theirs) == len(ours) and all(map(_close, theirs, ours))
    return theirs == ours


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-4)


def _shown(value: Any) -> str:
    return ", ".join(f"{part:.4g}" for part in value) if isinstance(value, tuple) else str(value)


def _of_torchvision(name: str, model: Model) -> Preprocessing | None:
    from torchvision.models import get_model_weights
    from torchvision.transforms._presets import ImageClassification

    try:
        members = get_model_weights(name)
    except ValueError:  # no such network: whoever makes it says so
        return _USUAL
    weights = members.__members__.get(str(model.pretrained)) or members.__members__.get("DEFAULT")
    steps = weights.transforms() if weights is not None else None
    if not isinstance(steps, ImageClassification):
        return None if steps is not None else _USUAL
    return Preprocessing(
        tuple(steps.mean),
        tuple(steps.std),
        steps.crop_size[0],
        steps.resize_size[0],
        "center",
        steps.interpolation.value,
        f"torchvision's {type(weights).__name__}.{weights.name}",
    )


def _of_timm(name: str, model: Model) -> Preprocessing:
    try:
        from timm.data.config import resolve_data_config
        from timm.models import get_pretrained_cfg
    except ImportError:  # whoever makes the network says so
        return _USUAL
    asked = f"{name.partition('.')[0]}.{model.pretrained}" if isinstance(model.pretrained, str) else name
    for tag in dict.fromkeys((asked, name)):
        try:
            found = get_pretrained_cfg(tag)
        except RuntimeError:  # no such network
            continue
        if found is None:
            continue
        config = resolve_data_config(pretrained_cfg=found.to_dict())
        _, *sides = config["input_size"]
        square = len(set(sides)) == 1
        return Preprocessing(
            tuple(config["mean"]),
            tuple(config["std"]),
            sides[0] if square else None,
            math.floor(sides[0] / config["crop_pct"]) if square else None,
            "squash" if config["crop_mode"] == "squash" else "center",
            config["interpolation"],
            f"timm's {found.architecture or tag}{f'.{found.tag}' if found.tag else ''}",
        )
    return _USUAL
