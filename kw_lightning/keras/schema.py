"""The vocabulary as a part of the language's JSON Schema, so that editors complete layers and their arguments.

It only describes: any argument may be a `$reference`, which a schema cannot follow, and `read_network` gives messages
with shapes and the way through blocks. To bring it up to date: `python -m kw_lightning.keras.schema`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from kw_lightning.keras import layers as _vocabulary  # noqa: F401 -- registers the layers
from kw_lightning.keras.layer import LAYERS, Layer, kind_of
from kw_lightning.keras.reference import first_paragraph
from kw_lightning.resources import shipped

SHARED = {
    "name": "Name of the module; Keras's default name unless given.",
    "inputs": "The layer that this one takes, or several of them; the one above unless given.",
    "repeat": "How many times in a row, with weights of its own each time.",
}
# A line a layer, between the definition of lists of layers and the next one.
_PLACE = re.compile(r'(?m)^    "layer": \{\n(?:      .*\n)+    \},\n')


def layer_schema() -> dict[str, Any]:
    """Return the schema of one entry of a list of layers: a map from a layer's name to its arguments."""
    return {
        "description": "A layer of the vocabulary with its arguments, or a block of this recipe with its parameters.",
        "guide": "keras/README.md",
        "properties": {name: _kind_schema(kind) for name, kind in LAYERS.items()},
    }


def layer_schema_text() -> str:
    """Return the schema as it stands in the shipped file."""
    schema = layer_schema()
    lines = [f"        {json.dumps(name)}: {_text(part)}" for name, part in schema.pop("properties").items()]
    head = [f"      {json.dumps(key)}: {_text(value)}," for key, value in schema.items()]
    return "\n".join(['    "layer": {', *head, '      "properties": {', ",\n".join(lines), "      }", "    },", ""])


def updated(text: str) -> str:
    """Return the language's schema with this part brought up to date."""
    return _PLACE.sub(lambda _: layer_schema_text(), text, count=1)


def _kind_schema(kind: type[Layer]) -> dict[str, Any]:
    arguments = {name: _argument_schema(kind, field) for name, field in kind.arguments().items()}
    shared = {name: {"description": description} for name, description in SHARED.items()}
    return {"description": first_paragraph(kind), "properties": {**arguments, **shared}}


def _argument_schema(kind: type[Layer], field: dataclasses.Field[Any]) -> dict[str, Any]:
    allowed = kind_of(field).allowed(kind.dimensions)
    schema: dict[str, Any] = {"description": f"{allowed[0].upper()}{allowed[1:]}."}
    if field.default is dataclasses.MISSING:
        schema["description"] = f"Needed: {allowed}."
    elif field.default is not None:
        schema["default"] = field.default
    return schema


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def main() -> None:
    """Bring the shipped schema up to date."""
    file = Path(str(shipped("schemas"))) / "recipe-1.schema.json"
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
