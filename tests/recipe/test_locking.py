"""Locks, and the YAML that they are written in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe, lock_text
from kw_lightning.recipe.comparison import ABSENT, Difference, differences
from kw_lightning.recipe.limits import MAX_DIGITS, MAX_KEY
from kw_lightning.recipe.locking import content_hash
from kw_lightning.recipe.reading import read_yaml
from kw_lightning.recipe.sources import sha256
from kw_lightning.recipe.writing import to_yaml


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("kw: 1\ntrain: {epochs: 3}\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "kw: 1\nextends: base.yaml\nvars: {n: 2}\ndescription: costs $${n}\n"
        "warehouses:\n  a: {layers: ['x${n}', 'on', '1e-3', {type: Conv2d, kernel_size: 3}], budget: 1/2}\n"
    )
    return file


def test_lock_holds_the_resolved_recipe_and_where_it_came_from(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.seed=7"])
    lock = recipe_file.with_name("locked.yaml")
    lock.write_text(lock_text(recipe))
    again = load_recipe(lock)
    assert again.document.data == recipe.document.data
    assert again.name == "recipe"
    assert again.description == "costs ${n}"
    assert again.warehouses == recipe.warehouses
    assert again.train is not None
    assert (again.train.epochs, again.train.seed) == (3, 7)
    entry = read_yaml(lock.read_bytes(), "lock").plain()["lock"]
    base, own = entry["sources"]
    assert (base["file"], own["file"]) == (str(recipe_file.with_name("base.yaml")), str(recipe_file))
    assert own["sha256"] == sha256(recipe_file.read_bytes())
    assert entry["overrides"] == ["train.seed=7"]
    assert {"python", "kw-lightning", "torch"} <= set(entry["versions"])


def test_versions_of_packages_that_recipes_come_from_are_locked() -> None:
    text = lock_text(load_recipe("resnet18-kw-1d2x"))
    sources = read_yaml(text, "lock").plain()["lock"]["sources"]
    assert [Path(source["file"]).name for source in sources] == ["resnet18-kw-1x.yaml", "resnet18-kw-1d2x.yaml"]
    assert all(source["version"] for source in sources)


def test_changed_lock_is_refused_wherever_it_is_used(recipe_file: Path) -> None:
    lock = recipe_file.with_name("locked.yaml")
    text = lock_text(load_recipe(recipe_file))
    lock.write_text(text.replace("epochs: 3", "epochs: 4"))
    with pytest.raises(
        RecipeError, match=r"locked\.yaml:\d+:\d+: lock\.content: the file was changed after it was locked"
    ):
        load_recipe(lock)
    with pytest.raises(RecipeError, match="changed after it was locked"):
        load_recipe(lock, ["train.epochs=3"])
    leaf = recipe_file.with_name("leaf.yaml")
    leaf.write_text("kw: 1\nextends: locked.yaml\n")
    with pytest.raises(RecipeError, match=r"locked\.yaml:\d+:\d+: lock\.content"):
        load_recipe(leaf)
    lock.write_text(text)
    assert load_recipe(leaf).train == load_recipe(recipe_file).train


def test_lock_does_not_depend_on_how_it_is_written_and_may_be_overridden(recipe_file: Path) -> None:
    lock = recipe_file.with_name("locked.yaml")
    lock.write_text("# a comment\n\n" + lock_text(load_recipe(recipe_file)).replace("budget: 1/2", 'budget:   "1/2"'))
    recipe = load_recipe(lock, ["train.epochs=9"])
    assert recipe.train is not None
    assert recipe.train.epochs == 9
    assert "lock" not in recipe.document.data


@pytest.mark.parametrize("lock", ["{}", "3", "[a]", "{content: 5}", "{content: {a: b}}"])
def test_lock_without_a_hash_is_refused(lock: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"kw: 1\nlock: {lock}\n")
    with pytest.raises(RecipeError, match='the key "content" is missing'):
        load_recipe(file)


def test_hash_is_of_the_content_alone() -> None:
    assert content_hash({"a": 1, "b": [1.5, "x"]}) == content_hash({"b": [1.5, "x"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash({"a": "1"}) != content_hash({"a": 1})


NUMBERS = st.one_of(
    st.integers(-(10**MAX_DIGITS) + 1, 10**MAX_DIGITS - 1), st.floats(allow_nan=False, allow_infinity=False)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(st.characters(exclude_categories=["Cs"])))
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_KEY)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_written_reads_back_the_same(data: dict[str, Any]) -> None:
    text = to_yaml(data, lambda path: "note" if len(path) % 2 else None)
    read = read_yaml(text, "x").plain()
    assert read == (data or None) or (data == {} and read is None)
    assert [type(value) for value in (read or {}).values()] == [type(value) for value in data.values()]


def test_yaml_is_short_where_it_can_be() -> None:
    data = {"a": {"b": [1, "x.*", "1/2"], "c": [{"d": 1, "e": []}, {}], "f": {}, "g": math.pi, "h": "yes", "i": "1e-3"}}
    assert to_yaml(data) == (
        "a:\n  b: [1, x.*, 1/2]\n  c:\n    - d: 1\n      e: []\n    - {}\n  f: {}\n"
        '  g: 3.141592653589793\n  h: yes\n  i: "1e-3"\n'
    )


def test_differences_name_keys_and_both_values() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": [1]}, "e": {"f": True}, "same": 1}
    after = {"a": 1.0, "b": {"c": [1, 3], "d": [1, 2]}, "g": {"h": 0}, "e": {"f": 1}, "same": 1}
    assert list(differences(before, after)) == [
        Difference("b.c[1]", 2, 3),
        Difference("b.d", [1], [1, 2]),
        Difference("e.f", True, 1),
        Difference("g.h", ABSENT, 0),
    ]
    assert list(differences({"a": {"b": 1, "c": []}}, {})) == [
        Difference("a.b", 1, ABSENT),
        Difference("a.c", [], ABSENT),
    ]
