"""The JSON Schema of the language: loading it, finding its way along a key path, and saying in words what it allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from kw_lightning.resources import shipped

VERSION = 1
SHOWN_MAXIMUM = 10_000
"""Larger ones only guard against absurd values, and tell nothing to someone who wrote a text for a number."""
Schema = Mapping[str, Any]


@cache
def schema_text() -> str:
    """Return the JSON Schema as it is shipped."""
    text: str = (shipped("schemas") / f"recipe-{VERSION}.schema.json").read_text(encoding="utf-8")
    return text


@cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema."""
    loaded: dict[str, Any] = json.loads(schema_text())
    return loaded


def editor_schema() -> dict[str, Any]:
    """Return the schema of a file as it is written: any key may be empty, and what it extends has what is needed.

    Lists are not merged, so what is in them stays whole.
    """
    whole = schema()
    parts = {name: part if name in _OF_LISTS else _open(part) for name, part in whole["$defs"].items()}
    return {**_open(whole), "required": whole["required"], "$defs": parts}


_OF_LISTS = ("layer", "selector", "conditions", "source")
_MAPS = ("properties", "patternProperties")


def _open(part: Schema) -> dict[str, Any]:
    """Return a part of the schema in which no key has to be there or has to have a value."""
    found = {key: value for key, value in part.items() if key != "required"}
    for key in _MAPS:
        if key in found:
            found[key] = {name: _or_nothing(_open(child)) for name, child in found[key].items()}
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = _or_nothing(_open(found["additionalProperties"]))
    if "anyOf" in found:
        found["anyOf"] = [_open(branch) for branch in found["anyOf"]]
    if "allOf" in found:
        found["allOf"] = [{**branch, "then": _open(branch["then"])} for branch in found["allOf"]]
    return found


def _or_nothing(part: Schema) -> dict[str, Any]:
    """Return a part of the schema that takes null as well; one that takes anything does so already."""
    found, nothing = dict(part), {"type": "null"}
    if (reference := found.pop("$ref", None)) is not None:
        return {**found, "anyOf": [{"$ref": reference}, nothing]}
    if "anyOf" in found:
        return {**found, "anyOf": [*found["anyOf"], nothing]}
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    if "type" in found:
        found["type"] = [found["type"], "null"]
    return found


def resolve(part: Schema) -> dict[str, Any]:
    """Return a part of the schema with what its `$ref` names filled in; its own keys win."""
    resolved = dict(part)
    while (reference := resolved.pop("$ref", None)) is not None:
        resolved = {**schema()["$defs"][reference.removeprefix("#/$defs/")], **resolved}
    return resolved


def branches(part: Schema) -> list[dict[str, Any]]:
    """Return the alternatives of a part of the schema; itself when there is one way only."""
    resolved = resolve(part)
    if "anyOf" not in resolved:
        return [resolved]
    return [leaf for branch in resolved["anyOf"] for leaf in branches(branch)]


def types(part: Schema) -> set[str]:
    """Return the JSON types that a part of the schema allows; empty when all are."""
    found: set[str] = set()
    for branch in branches(part):
        if "type" in branch:
            found.add(branch["type"])
        elif "enum" in branch or "const" in branch:
            found |= {type_name(value) for value in branch.get("enum", [branch.get("const")])}
        else:
            return set()
    return found


def type_name(value: object) -> str:
    """Return the JSON type of plain data."""
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def accepts(part: Schema, value: object) -> bool:
    """Return whether the type of a value is one that this part allows."""
    allowed, name = types(part), type_name(value)
    return not allowed or name in allowed or (name == "integer" and "number" in allowed)


def children(part: Schema, key: str | int) -> Iterator[dict[str, Any]]:
    """Yield what the schema says of a key or index inside a part, in each alternative that has one."""
    for branch in branches(part):
        if isinstance(key, int):
            if isinstance(branch.get("items"), dict):
                yield resolve(branch["items"])
        elif key in branch.get("properties", {}):
            yield resolve(branch["properties"][key])
        elif isinstance(branch.get("additionalProperties"), dict):
            yield resolve(branch["additionalProperties"])


def at(keys: Sequence[str | int]) -> dict[str, Any] | None:
    """Return what the schema says of a key path, None when it says nothing."""
    part: dict[str, Any] | None = schema()
    for key in keys:
        part = next(children(part, key), None) if part is not None else None
    return part


@cache
def key_paths() -> dict[str, tuple[str, ...]]:
    """Return every key of the language with the paths at which it is allowed: outer ones first, as they are written."""
    found: dict[str, list[str]] = {}

    def visit(part: Schema, path: str) -> None:
        for branch in branches(part):
            for key, child in branch.get("properties", {}).items():
                inner = f"{path}.{key}" if path else key
                found.setdefault(key, []).append(inner)
                visit(child, inner)
            if isinstance(branch.get("additionalProperties"), dict):
                visit(branch["additionalProperties"], f"{path}.NAME")

    visit(schema(), "")
    return {key: tuple(sorted(dict.fromkeys(paths), key=lambda path: path.count("."))) for key, paths in found.items()}


def in_words(part: Schema) -> str:
    """Return what a part of the schema allows, in words: `a whole number of at least 1`."""
    phrases = list(dict.fromkeys(_branch_in_words(branch) for branch in branches(part)))
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} or {phrases[-1]}"


def _branch_in_words(branch: Schema) -> str:
    if "const" in branch:
        return json.dumps(branch["const"])
    if "enum" in branch:
        return listing(branch["enum"])
    kind = branch.get("type")
    if kind == "boolean":
        return "true or false"
    if kind in ("integer", "number"):
        return f"a {'whole number' if kind == 'integer' else 'number'}{_range(branch)}"
    if kind == "string":
        return str(branch.get("patternErrorMessage", "a text"))
    if kind == "array":
        return f"a list{_count(branch)}"
    if kind == "object":
        keys = branch.get("properties")
        if not keys or "guide" in branch:  # the layers of a network: too many for a line
            return "a map"
        if branch.get("maxProperties") == 1:
            return f"a map with {' or '.join(keys)}"
        return f"a map with {listing(keys)}"
    return "anything"


def _range(branch: Schema) -> str:
    parts = []
    if "exclusiveMinimum" in branch:
        parts.append(f"over {branch['exclusiveMinimum']}")
    if "minimum" in branch:
        parts.append(f"of at least {branch['minimum']}")
    if "exclusiveMaximum" in branch:
        parts.append(f"under {branch['exclusiveMaximum']}")
    if "maximum" in branch and branch["maximum"] <= SHOWN_MAXIMUM:
        parts.append(f"at most {branch['maximum']}")
    return f" {' and '.join(parts)}" if parts else ""


def _count(branch: Schema) -> str:
    least, most = branch.get("minItems", 0), branch.get("maxItems")
    values = "value" if least == 1 else "values"
    if least == most:
        return f" of {least} {values}"
    return f" of at least {least} {values}" if least else ""


def listing(names: Sequence[Any] | Mapping[str, Any]) -> str:
    """Return names in a row; keys that append (`layers+`) are left to the language reference."""
    shown = [str(name) for name in names if not str(name).endswith("+")]
    return ", ".join(shown)
