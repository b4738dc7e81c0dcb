"""The schema describes every key, agrees with the typed recipe's defaults, and the reference agrees with the schema."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.recipe.reference import START, reference, updated
from kw_lightning.recipe.scalars import read_ratio
from kw_lightning.recipe.schema import at, editor_schema, key_paths, resolve, schema, schema_text
from kw_lightning.recipe.sources import names
from kw_lightning.recipe.types import (
    Attention,
    Cell,
    Data,
    Log,
    Optimizer,
    Recipe,
    Schedule,
    Stages,
    Temperature,
    Train,
)
from kw_lightning.resources import shipped


def properties(part: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every key that the schema's text names, with what it says of it."""
    if isinstance(part, dict):
        for key, child in part.get("properties", {}).items():
            yield f"{path}.{key}", child
        for key, child in part.items():
            if key != "if":  # a condition, in which keys are named again
                yield from properties(child, f"{path}.{key}")
    elif isinstance(part, list):
        for index, child in enumerate(part):
            yield from properties(child, f"{path}[{index}]")


def test_schema_is_one_of_its_draft() -> None:
    Draft202012Validator.check_schema(schema())


def test_an_editor_takes_every_shipped_recipe_and_what_removes_inherited_keys() -> None:
    Draft202012Validator.check_schema(editor_schema())
    validator = Draft202012Validator(editor_schema())
    files = [file for file in Path(str(shipped("recipes"))).rglob("*.yaml") if file.name != "lightning_cli.yaml"]
    assert len(files) > 50
    for file in files:
        assert [error.message for error in validator.iter_errors(read_yaml(file.read_text(), file.name).plain())] == []
    assert validator.is_valid({"kw": 1, "warehouses": {"stage4": None}, "train": {"mixup": None}, "data": None})
    assert not validator.is_valid({})


@pytest.mark.parametrize(
    "mistake",
    [
        {"train": {"epoch": 1}},
        {"train": {"epochs": "ten"}},
        {"data": {"name": "digits", "args": {"x": 1}}},
        {"warehouses": {"a": {"layers": [None]}}},
        {"train": {"optimizer": {"groups": [{"lr": 1}]}}},
    ],
)
def test_an_editor_still_marks_mistakes(mistake: dict[str, Any]) -> None:
    validator = Draft202012Validator(editor_schema())
    assert not validator.is_valid({"kw": 1, **mistake})


def test_every_key_has_a_description() -> None:
    keys = dict(properties(schema()))
    assert len(keys) > 100
    assert [path for path, part in keys.items() if not resolve(part).get("description", "").endswith(".")] == []


def test_every_map_refuses_unknown_keys() -> None:
    def maps(part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, dict):
            if part.get("type") == "object" and "properties" in part:
                yield part
            for child in part.values():
                yield from maps(child)
        elif isinstance(part, list):
            for child in part:
                yield from maps(child)

    found = list(maps(schema()))
    assert len(found) > 15
    assert all(part.get("additionalProperties") is False for part in found)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("temperature",), Temperature()),
        (("train",), Train()),
        (("train", "optimizer"), Optimizer()),
        (("train", "schedule"), Schedule()),
        (("data",), Data(name="digits")),
        (("defaults", "cell"), Cell()),
        (("defaults", "attention"), Attention()),
        (("stages",), Stages()),
        (("log",), Log()),
        ((), Recipe(name="x", document=load_recipe({"kw": 1}).document)),
    ],
)
def test_defaults_of_the_schema_are_those_of_the_typed_recipe(path: tuple[str, ...], values: Any) -> None:
    renamed = {"in": "in_"}
    part = at(path)
    assert part is not None
    branch = next(branch for branch in part.get("anyOf", [part]) if "properties" in resolve(branch))
    checked = 0
    for key, child in resolve(branch)["properties"].items():
        default = resolve(child).get("default")
        actual = getattr(values, renamed.get(key, key), None)
        if default is None or dataclasses.is_dataclass(actual):
            continue
        if isinstance(actual, Fraction):
            default = read_ratio(default)
        assert actual == (None if default == "none" else default), key
        checked += 1
    assert checked > 0


def test_reference_is_current() -> None:
    text = (shipped("recipes") / "README.md").read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m kw_lightning.recipe.reference recipes/README.md"
    assert all(f"| `{key}` |" in text for key in key_paths())
    with pytest.raises(ValueError, match="has no line"):
        updated("no marker")


def test_reference_links_to_its_own_sections() -> None:
    text = reference()
    anchors = {
        "".join(c for c in line[4:].lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in text.splitlines()
        if line.startswith("### ")
    }
    links = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert links
    assert links <= anchors


def test_examples_of_the_readme_are_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (shipped("recipes") / "README.md").read_text(encoding="utf-8").partition(START)[0]
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    recipes = [block for block in blocks if "kw: 1\n" in block]
    assert len(recipes) == 3
    for block in recipes:
        data = yaml.safe_load(block.replace(", team/short-training", ""))
        assert load_recipe(data).warehouses


def test_shipped_recipes_are_right_and_name_the_schema() -> None:
    editor = Path(str(shipped("schemas"))) / "recipe-1.editor.schema.json"
    assert json.loads(editor.read_text(encoding="utf-8")) == editor_schema(), f"it is old: kw schema > {editor}"
    validator = Draft202012Validator(editor_schema())
    known = names()
    assert len(known) >= 15
    for name, source in known.items():
        assert load_recipe(name).description, f"{name} has no description for kw list"
        assert load_recipe(source.path).document.data == load_recipe(name).document.data
        first = source.read().decode().splitlines()[0]
        start = "# yaml-language-server: $schema="
        assert first.startswith(start), f"{name} lacks the line for editors"
        assert (source.path.parent / first.removeprefix(start)).resolve() == editor.resolve()
        found = [error.message for error in validator.iter_errors(yaml.safe_load(source.read()))]
        assert found == [], f"an editor that reads its first line marks {name}"
    assert len({source.path for source in known.values()}) == len(known), "two shipped recipes have one name"


def test_schema_accepts_what_the_loader_accepts_for_editors() -> None:
    # Editors do not know the keywords for fractions; everything else they check as the loader does.
    plain = Draft202012Validator(json.loads(schema_text()))
    assert plain.is_valid(
        {"kw": 1, "x-notes": {"any": "thing"}, "warehouses": {"a": {"layers+": ["x"], "budget": "1/2"}}}
    )
    assert not plain.is_valid({"kw": 1, "warehouses": {"a": {"layer": ["x"]}}})
    with pytest.raises(RecipeError):
        load_recipe({"kw": 1, "defaults": {"cell": {"out": "3/2"}}})


def test_reading_recipes_needs_no_torch() -> None:
    code = "import sys, kw_lightning.recipe as r; r.load_recipe('resnet18-kw-1x'); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "False"
