"""How the arguments of layers are read: plain data from a recipe → typed values, or what is allowed instead.

A layer's argument is a field of its dataclass made by `argument(kind, default)`. A kind reads a value for layers of a
number of spatial dimensions (1 for Conv1D, 2 for Conv2D …) and describes itself as JSON Schema for editors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from kw_lightning.limits import MAX_ARGUMENT

Shape = tuple[int, ...]
"""The shape of one sample, without the batch: [channels, *size], [features] or [tokens, features]."""
Sides = tuple[int, ...]
"""One number for each spatial dimension."""

REFERENCE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Argument:
    """A kind of argument.

    Attributes:
        allowed: what is allowed, for messages.
        read: (value, dimensions) → typed value; raises ValueError for anything else.
        schema: dimensions → JSON Schema of the value.
    """

    allowed: Callable[[int], str]
    read: Callable[[object, int], Any]
    schema: Callable[[int], dict[str, Any]]

    def names(self, dimensions: int) -> list[str]:
        """Return the names among what is allowed."""
        schema = self.schema(dimensions)
        return [name for part in (schema, *schema.get("anyOf", ())) for name in part.get("enum", ())]


def argument(kind: Argument, default: Any = MISSING, *, note: str = "") -> Any:
    """Return the dataclass field of an argument; one without a default is required."""
    return dataclasses.field(default=default, metadata={"argument": kind, "note": note})


def whole(least: int = 1, most: int = MAX_ARGUMENT) -> Argument:
    """Return the kind of a whole number."""

    def read(value: object, dimensions: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError
        return value

    return Argument(
        lambda dimensions: f"a whole number from {least:,} to {most:,}",
        read,
        lambda dimensions: {"type": "integer", "minimum": least, "maximum": most},
    )


def number(least: float = -math.inf, most: float = math.inf, *, below: float = math.inf) -> Argument:
    """Return the kind of a number from `least` to `most`, and under `below`."""

    def read(value: object, dimensions: int) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not (math.isfinite(value) and least <= value <= most and value < below):
            raise ValueError
        return float(value)

    bounds = [
        f"at least {least:g}" if least > -math.inf else "",
        f"at most {most:g}" if most < math.inf else "",
        f"under {below:g}" if below < math.inf else "",
    ]
    text = " ".join(["a number", " and ".join(filter(None, bounds))]).strip()
    schema: dict[str, Any] = {"type": "number"}
    for key, bound in (("minimum", least), ("maximum", most), ("exclusiveMaximum", below)):
        if math.isfinite(bound):
            schema[key] = bound
    return Argument(lambda dimensions: text, read, lambda dimensions: schema)


def flag() -> Argument:
    """Return the kind of true and false."""

    def read(value: object, dimensions: int) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Argument(lambda dimensions: "true or false", read, lambda dimensions: {"type": "boolean"})


def choice(*names: str) -> Argument:
    """Return the kind of one of several names."""

    def read(value: object, dimensions: int) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Argument(lambda dimensions: "one of " + ", ".join(names), read, lambda dimensions: {"enum": list(names)})


def text() -> Argument:
    """Return the kind of a name."""

    def read(value: object, dimensions: int) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return Argument(lambda dimensions: "a name", read, lambda dimensions: {"type": "string", "minLength": 1})


def optional(kind: Argument) -> Argument:
    """Return the kind of a value or none (`null`)."""
    return either(kind, "nothing", {"type": "null"}, lambda value: value is None)


def either(kind: Argument, words: str, schema: Mapping[str, Any], accepts: Callable[[object], bool]) -> Argument:
    """Return a kind that also takes what `accepts` says, unchanged."""
    return Argument(
        lambda dimensions: f"{kind.allowed(dimensions)}, or {words}",
        lambda value, dimensions: value if accepts(value) else kind.read(value, dimensions),
        lambda dimensions: {"anyOf": [kind.schema(dimensions), dict(schema)]},
    )


def sides(least: int = 1) -> Argument:
    """Return the kind of one whole number for all spatial dimensions, or one for each."""
    side = whole(least)

    def read(value: object, dimensions: int) -> Sides:
        if not isinstance(value, list | tuple):
            return (side.read(value, dimensions),) * dimensions
        if len(value) != dimensions:
            raise ValueError
        return tuple(side.read(item, dimensions) for item in value)

    def schema(dimensions: int) -> dict[str, Any]:
        item = side.schema(dimensions)
        return {"anyOf": [item, {"type": "array", "items": item, "minItems": dimensions, "maxItems": dimensions}]}

    return Argument(lambda dimensions: f"{side.allowed(dimensions)}, or {dimensions} of them in a list", read, schema)


def padding(*names: str) -> Argument:
    """Return the kind of a padding: a name as in Keras, or numbers (both sides alike), as PyTorch pads."""
    numbers, by_name = sides(0), choice(*names)

    def read(value: object, dimensions: int) -> str | Sides:
        if isinstance(value, str):
            return str(by_name.read(value, dimensions))
        return tuple(numbers.read(value, dimensions))

    return Argument(
        lambda dimensions: f"{by_name.allowed(dimensions)}, or {numbers.allowed(dimensions)}",
        read,
        lambda dimensions: {"anyOf": [by_name.schema(dimensions), *numbers.schema(dimensions)["anyOf"]]},
    )


def margins() -> Argument:
    """Return the kind of ZeroPadding's argument: one number, one for each dimension, or [before, after] for each."""
    side = whole(0)

    def read(value: object, dimensions: int) -> tuple[Sides, ...]:
        if not isinstance(value, list | tuple):
            value = [value] * dimensions
        if len(value) != dimensions:
            raise ValueError
        pairs = [item if isinstance(item, list | tuple) else (item, item) for item in value]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
        return tuple((side.read(pair[0], dimensions), side.read(pair[1], dimensions)) for pair in pairs)

    def schema(dimensions: int) -> dict[str, Any]:
        item = side.schema(dimensions)
        pair = {"anyOf": [item, {"type": "array", "items": item, "minItems": 2, "maxItems": 2}]}
        return {"anyOf": [item, {"type": "array", "items": pair, "minItems": dimensions, "maxItems": dimensions}]}

    return Argument(
        lambda dimensions: f"a whole number, or a list of {dimensions} numbers or pairs [before, after]", read, schema
    )


def numbers(least: int, most: int = MAX_ARGUMENT, *, example: str) -> Argument:
    """Return the kind of a list of whole numbers, as many as one likes."""
    item = whole(least, most)

    def read(value: object, dimensions: int) -> tuple[int, ...]:
        if not isinstance(value, list | tuple) or not 0 < len(value) <= 8:
            raise ValueError
        return tuple(item.read(number, dimensions) for number in value)

    return Argument(
        lambda dimensions: f"a list such as {example}",
        read,
        lambda dimensions: {"type": "array", "items": item.schema(dimensions), "minItems": 1, "maxItems": 8},
    )


def axis() -> Argument:
    """Return the kind of an axis as Keras counts: 0 is the batch, -1 the last."""
    kind = either(
        whole(1, 8),
        "-1 for the last",
        {"type": "integer", "minimum": -8, "maximum": -1},
        lambda value: _negative(value),
    )
    return dataclasses.replace(kind, allowed=lambda dimensions: "an axis: 1 is the first after the batch, -1 the last")


def _negative(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -8 <= value < 0
