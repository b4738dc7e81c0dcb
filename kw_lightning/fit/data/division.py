"""The parts that a run works with: those of the data set, and where it has none, one that validates."""

from __future__ import annotations

from collections.abc import Sequence

from kw_lightning.errors import listed
from kw_lightning.fit.data.sets import Samples, Source, Subset, names_of, strata_of
from kw_lightning.fit.data.splitting import Split, draw
from kw_lightning.recipe.types import Data, Recipe, Train


def divided(
    recipe: Recipe, source: Source, split: Split | None = None
) -> tuple[dict[str, Samples], Split | None, tuple[str, ...]]:
    """Return the parts "train", "val" and "test", what was drawn for "val" if anything was, and what is to be said.

    Args:
        recipe: the recipe.
        source: its data set.
        split: what was drawn before, in the run that is gone on from or evaluated.
    """
    assert recipe.data is not None
    data, parts = recipe.data, dict(source.parts)
    train, own = parts.get("train"), parts.pop("validation", None)
    asked = "validation" in recipe.document.data.get("data", {})
    notes: list[str] = []
    if own is not None:
        if asked and data.validation is not None:
            notes.append("it has a validation part of its own, which is used in the place of data.validation")
        parts["val"] = own
    elif train is not None and data.validation is not None:
        names = names_of(train)
        seed = (recipe.train or Train()).seed
        drawn = split or draw(names, strata_of(train), data.validation, seed)
        kept, held = drawn.places(names)
        notes += _notes(drawn, source, len(held), len(names), asked)
        if held and kept:
            parts |= {"train": Subset(train, kept), "val": Subset(train, held)}
            return parts, drawn, _said(data, notes)
    if "val" not in parts:
        notes.append(_without(parts, data))
    return parts, None, _said(data, notes)


def _notes(drawn: Split, source: Source, held: int, count: int, asked: bool) -> list[str]:
    notes = []
    if drawn.alone:
        names = [source.classes[target] if source.classes else str(target) for target in drawn.alone if target >= 0]
        notes.append(f"of a class with a single image none validates: {listed(names)}")
    if 0 < held < len(drawn.validation):
        lacking = len(drawn.validation) - held
        notes.append(f"{lacking:,} of the {len(drawn.validation):,} images that validated are not there")
    if held and not asked:
        notes.append(
            f"no validation part: {held:,} of the {count:,} training images validate, evenly from every class; "
            "data.validation says how many"
        )
    return notes


def _without(parts: dict[str, Samples], data: Data) -> str:
    if "test" in parts and data.test:
        return "no validation part, so that no checkpoint is chosen: the last one is tested"
    found = (
        "neither a validation nor a test part" if "test" not in parts else "no validation part, and data.test is false"
    )
    return f"{found}: the last checkpoint is the one that is used, and nothing is measured"


def _said(data: Data, notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"data: {data.root or data.name}: {note}" for note in notes)
