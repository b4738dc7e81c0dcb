"""Hypothesis strategies for recipes: derived from the schema, and shipped ones with something broken."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1]))

from fuzzing import broken

from kw_lightning.recipe.schema import Schema, branches, schema
from kw_lightning.recipe.sources import Source, names

FRACTIONS = ("1/2", "1/4", "2", "1/0", "0/1", "-1/2", "3/2", "1/16", "9999999999/3", "1/", "/2", "½")
SIZES = ("7.5M", "1K", "0K", "3 G", "11.7M", "-1M", "1T")
TEXTS = st.one_of(
    st.sampled_from(("", "auto", "none", "*", "layer1.*.conv?", "fc[2/3:]", "x[", "[!", "a[:0]", "yes", "1e-3")),
    st.sampled_from(("${a}", "${", "$${a}", "${b}", *FRACTIONS, *SIZES)),
    st.text(max_size=20),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2, 70), st.floats(), st.floats(0, 1), TEXTS)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
# What stands behind a key on the command line.
SUFFIXES = ("+", "[0]", "[-1]", "[999999]", ".x", ".", "[", "[0][0]", "++")
# What breaks a file: signs of YAML, numbers, keys of the language, bytes that are no UTF-8.
PIECES = st.one_of(
    st.sampled_from(
        [b":", b"\n", b"  ", b"\t", b"- ", b"[", b"]", b"{", b"}", b"#", b"'", b'"', b"\\", b"|", b">", b"%"]
    ),
    st.sampled_from([b"---\n", b"...", b"? ", b"&a ", b"*a", b"<<: *a\n", b"!!python/name:os.system ", b"${a}", b"+:"]),
    st.sampled_from([b"null", b"1/0", b"1e999", b"9" * 30, b"\xff", b"\0", b"\xf0", b'"\\ud800"', b'"\\e[31m"']),
    st.sampled_from([b"extends: ../x.yaml\n", b"kw: 1\n", b"x-a: &a {}\n", b"lock: {}\n", b"stages: auto\n"]),
    st.binary(max_size=8),
)


def valid(part: Schema, depth: int = 0) -> st.SearchStrategy[Any]:
    """Return a strategy for values of the kind that a part of the schema allows; their range is often missed."""
    return st.one_of([_branch(branch, depth) for branch in branches(part)])


def recipes() -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for whole recipes, some of them right."""
    keys = {key: child for key, child in schema()["properties"].items() if key not in ("kw", "lock")}
    return st.fixed_dictionaries(
        {"kw": st.one_of(st.just(1), st.just(1), JUNK)},
        optional={key: _spoilt(valid(child, 1), 8) for key, child in keys.items()},
    )


def broken_files(sources: Sequence[Source] = ()) -> st.SearchStrategy[bytes]:
    """Return a strategy for files of these recipes, else of any shipped one, with a few places broken."""
    known = sorted(sources or names().values(), key=lambda source: source.name)
    return broken(st.sampled_from(known).map(lambda source: source.read()), PIECES)


def overrides() -> st.SearchStrategy[str]:
    """Return a strategy for changes on the command line: mostly of keys that there are, some to values that fit."""
    paths = st.sampled_from(_paths((), schema()))
    keys = st.one_of(paths, paths, paths, st.builds("{}{}".format, paths, st.sampled_from(SUFFIXES)), TEXTS)
    values = st.one_of(JUNK.map(lambda value: json.dumps(value, default=str)), SCALARS.map(str), TEXTS)
    fitting = st.sampled_from(_examples((), schema()))
    return st.one_of(fitting, st.builds("{}{}{}".format, keys, st.sampled_from(("=", "=", "=", "", "==")), values))


def _paths(before: tuple[str, ...], part: Schema, depth: int = 0) -> list[str]:
    """Return the paths of all keys, a few names in the place of those that a recipe chooses."""
    found = [".".join(before)] if before else []
    for branch in branches(part) if depth < 6 else ():
        children = dict(branch.get("properties", {}))
        if isinstance(branch.get("additionalProperties"), Mapping):
            children |= dict.fromkeys(("stage1", "a"), branch["additionalProperties"])
        if isinstance(branch.get("items"), Mapping):
            found += [f"{path}[0]" for path in found[:1]]
        for key, child in children.items():
            found += _paths((*before, key), child, depth + 1)
    return found


def _examples(before: tuple[str, ...], part: Schema, depth: int = 0) -> list[str]:
    """Return changes with the values that the schema gives as examples, allowed words or bounds."""
    found = []
    for branch in branches(part) if depth < 6 else ():
        values = [*branch.get("examples", ()), *branch.get("enum", ())]
        values += [branch[bound] for bound in ("minimum", "maximum", "const") if bound in branch]
        found += [f"{'.'.join(before)}={json.dumps(value)}" for value in values if before]
        for key, child in branch.get("properties", {}).items():
            found += _examples((*before, key), child, depth + 1)
    return found


def _spoilt(strategy: st.SearchStrategy[Any], one_in: int) -> st.SearchStrategy[Any]:
    return st.integers(1, one_in).flatmap(lambda number: JUNK if number == 1 else strategy)


def _branch(branch: Mapping[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if "const" in branch:
        return st.just(branch["const"])
    if "enum" in branch:
        return st.sampled_from(branch["enum"])
    if depth > 6:
        return SCALARS
    match branch.get("type"):
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(branch.get("minimum", -1) - 1, min(branch.get("maximum", 100) + 1, 100))
        case "number":
            return st.one_of(
                st.floats(branch.get("minimum", 0), branch.get("maximum", 10)), st.sampled_from((0, 1, 0.5, 1e-3))
            )
        case "string":
            return st.one_of(st.sampled_from(branch.get("examples", ["x"])), TEXTS)
        case "array":
            return st.lists(_spoilt(valid(branch.get("items", {}), depth + 1), 20), max_size=3)
        case "object":
            return _object(branch, depth)
        case _:
            return JUNK


def _object(branch: Mapping[str, Any], depth: int) -> st.SearchStrategy[Any]:
    properties = branch.get("properties", {})
    if not properties:
        inside = branch.get("additionalProperties", True)
        keys = st.one_of(st.sampled_from(("a", "b", "stage1")), st.text(string.ascii_letters + ".-_[", max_size=5))
        return st.dictionaries(keys, JUNK if inside is True else valid(inside, depth + 1), max_size=3)
    known = {key: _spoilt(valid(child, depth + 1), 20) for key, child in properties.items()}
    required = {key: known.pop(key) for key in branch.get("required", ())}
    return st.fixed_dictionaries(required, optional=known)
