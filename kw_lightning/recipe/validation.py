"""A recipe's data against the schema: one clear line per mistake, and all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from kw_lightning.errors import Location, Problem, did_you_mean, listed, mistake
from kw_lightning.recipe import schema as language
from kw_lightning.recipe.limits import MAX_PROBLEMS
from kw_lightning.recipe.nodes import Node, join, join_all
from kw_lightning.recipe.scalars import read_ratio

_WRITTEN = 80
"""Characters of a value that a hint repeats at most."""

_TYPO = 0.8
"""How alike a key has to be to an allowed one to be a slip; below that it is looked for in other places first."""

Mistake = Any
"""A `jsonschema.ValidationError`, whose attributes are typed as possibly unset; those of a mistake found are set."""


def validate(node: Node) -> list[Problem]:
    """Return the mistakes of a recipe that the schema can see, in the order of the file."""
    errors = validator().iter_errors(node.plain())
    problems = itertools.chain.from_iterable(_explain(error, node) for error in errors)
    shown = list(itertools.islice(problems, MAX_PROBLEMS + 1))
    if len(shown) > MAX_PROBLEMS:
        shown[MAX_PROBLEMS:] = [Problem(f"more than {MAX_PROBLEMS} mistakes; the others are not shown")]
    return sort(shown)


def sort(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems in the order of their files and lines, each once; those without a place come last."""
    return sorted(dict.fromkeys(problems), key=_position)


@cache
def validator() -> Validator:
    """Return the validator of the language; fractions have their own keywords for their range."""
    keywords = {
        "fractionExclusiveMinimum": _fraction_over,
        "fractionMaximum": _fraction_at_most,
        "fractionExclusiveMaximum": _fraction_under,
    }
    made: Validator = extend(Draft202012Validator, keywords)(language.schema())  # type: ignore[no-untyped-call]
    return made


def _fraction_over(_: Validator, bound: int, value: object, __: Any) -> Iterator[ValidationError]:
    if (fraction := _fraction(value)) is not None and fraction <= bound:
        yield ValidationError("too small")


def _fraction_at_most(_: Validator, bound: int, value: object, __: Any) -> Iterator[ValidationError]:
    if (fraction := _fraction(value)) is not None and fraction > bound:
        yield ValidationError("too large")


def _fraction_under(_: Validator, bound: int, value: object, __: Any) -> Iterator[ValidationError]:
    if (fraction := _fraction(value)) is not None and fraction >= bound:
        yield ValidationError("too large")


def _fraction(value: object) -> Fraction | None:
    """Return a text's fraction; None for anything else, which other keywords refuse. A denominator 0 counts as 0."""
    if not isinstance(value, str):
        return None
    try:
        return read_ratio(value)
    except ValueError:
        return Fraction(0) if value.rstrip("0").endswith("/") else None


def _explain(error: Mistake, root: Node) -> Iterator[Problem]:
    keys = tuple(error.absolute_path)
    path, node = join_all(keys), _find(root, keys)
    if isinstance(node.value, dict) and isinstance(error.instance, str):  # a key, refused by `propertyNames`
        key, child = error.instance, node.value[error.instance]
        allowed = error.schema["patternErrorMessage"]
        yield Problem(mistake(key, allowed, what="the key"), join(path, key), child.key_location)
        return
    match error.validator:
        case "additionalProperties":
            yield from _unknown_keys(error, path, node)
        case "required":
            for key in error.validator_value:
                if key not in error.instance:
                    yield Problem(f'the key "{key}" is missing', path, node.place)
        case "anyOf":
            yield from _no_branch(error, root, path, node)
        case "maxItems" | "maxLength":
            what = "values" if error.validator == "maxItems" else "characters"
            message = f"found {len(error.instance):,} {what}, allowed: at most {error.validator_value:,}"
            yield Problem(message, path, node.place)
        case _:
            yield _wrong_value(error, path, node)


def _wrong_value(error: Mistake, path: str, node: Node) -> Problem:
    allowed = language.in_words(error.schema)
    if error.validator == "maximum" and error.validator_value > language.SHOWN_MAXIMUM:
        allowed += f" and at most {error.validator_value:,}"
    names = [str(name) for branch in language.branches(error.schema) for name in branch.get("enum", ())]
    message = mistake(error.instance, allowed, names=names, hint=_hint(error.schema, error.instance))
    return Problem(message, path, node.place)


def _unknown_keys(error: Mistake, path: str, node: Node) -> Iterator[Problem]:
    known = error.schema.get("properties", {})
    prefixes = tuple(pattern.removeprefix("^") for pattern in error.schema.get("patternProperties", {}))
    for key in error.instance:
        if key in known or (prefixes and key.startswith(prefixes)):
            continue
        child = node.value[key] if isinstance(node.value, dict) else node
        hint = did_you_mean(key, known, _TYPO) or _elsewhere(key) or did_you_mean(key, known)
        message = mistake(key, language.listing(known), what="the unknown key", hint=hint)
        yield Problem(message, join(path, key), child.key_location or child.place)


def _elsewhere(key: str) -> str:
    """Return where the language has a key that stands in the wrong place, of several the outermost ones."""
    paths = language.key_paths().get(key, ())
    outermost = [f'"{path}"' for path in paths if path.count(".") == paths[0].count(".")]
    return f"did you mean {listed(outermost, 3, ' or ')}?" if paths else ""


def _no_branch(error: Mistake, root: Node, path: str, node: Node) -> Iterator[Problem]:
    """Explain a value that no alternative allows by the one whose type it has; by all of them when that is not one."""
    if isinstance(error.instance, dict | list):
        fitting = [i for i, part in enumerate(error.validator_value) if language.accepts(part, error.instance)]
        if len(fitting) == 1:
            for inner in error.context:
                if inner.relative_schema_path[0] == fitting[0]:
                    yield from _explain(inner, root)
            return
    yield _wrong_value(error, path, node)


def _hint(part: language.Schema, value: object) -> str:
    """Return what was probably meant, where it is no name."""
    types = language.types(part)
    if isinstance(value, list | dict):
        return ""
    if types == {"array"} and value is not None:
        return f"write [{value}]" if len(str(value)) <= _WRITTEN else ""
    if types == {"string"} and "enum" not in part and isinstance(value, bool | int | float):
        return "put it in quotes"
    if isinstance(value, str) and "boolean" in types and value.lower() in _WORDS:
        return f"did you mean {_WORDS[value.lower()]}?"
    return ""


_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _find(root: Node, keys: tuple[str | int, ...]) -> Node:
    node = root
    for key in keys:
        inside: Any = node.value
        node = inside[key]
    return node


def _position(problem: Problem) -> tuple[bool, str, int, int]:
    place = problem.location or Location("", 0, 0)
    return (problem.location is None, place.file, place.line, place.column)
