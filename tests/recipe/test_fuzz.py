"""Random recipes: each is understood, or refused by a RecipeError with one line a mistake; no traceback and no hang.

The continuous integration runs `FEW` cases of each kind; `pytest -m slow tests/recipe/test_fuzz.py` runs `MANY`.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import TEXTS, broken_files, recipes

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import Recipe, load_recipe, lock_text
from kw_lightning.recipe.writing import to_yaml

FEW = 150
MANY = 10_000
SECONDS = 2.0
"""CPU time of one case, writing and reading it again included; a machine may be busy."""


def check(source: Any, overrides: tuple[str, ...] = ()) -> Recipe | None:
    """Load a recipe and hold the outcome to what every outcome must be."""
    recipe, problems = None, ()
    gc.disable()  # to collect what thousands of cases before this one left takes seconds, and is no cost of this one
    start = time.process_time()
    try:
        recipe = load_recipe(source, overrides)
    except RecipeError as error:
        problems = error.problems
    finally:
        gc.enable()
    assert time.process_time() - start < SECONDS
    assert (recipe is None) == bool(problems)
    for line in map(str, problems):
        assert line.splitlines() == [line], "one mistake is one line"
        assert line.isprintable()
        assert len(line) < 3000
    return recipe


def check_locked(recipe: Recipe, folder: Path) -> None:
    """Hold a recipe to the same meaning after it is written resolved, and after it is locked."""
    file = folder / "locked.yaml"
    file.write_text(lock_text(recipe), encoding="utf-8")
    again = load_recipe(file)
    assert json.dumps(again.document.data) == json.dumps(recipe.document.data)
    assert again.warehouses == recipe.warehouses
    assert to_yaml(recipe.document.data, lambda path: path or None).count("\n") > 0


def from_schema(folder: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes())
    def run(data: dict[str, Any]) -> None:
        recipe = check(data)
        if recipe is not None:
            check_locked(recipe, folder)

    run()


def from_shipped(folder: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(broken_files())
    def run(content: bytes) -> None:
        file = folder / "broken.yaml"
        file.write_bytes(content)
        recipe = check(file)
        if recipe is not None:
            check_locked(recipe, folder)

    run()


def from_overrides(folder: Path, count: int) -> None:
    keys = st.sampled_from(("train.epochs", "model.input[0]", "warehouses.a.layers+", "vars.x", "a", "", "train", "kw"))
    texts = st.builds("{}{}{}".format, st.one_of(keys, TEXTS), st.sampled_from(("=", "", "==")), TEXTS)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(texts, max_size=3))
    def run(overrides: list[str]) -> None:
        check({"kw": 1, "warehouses": {"a": {"layers": ["x"]}}}, tuple(overrides))

    run()


KINDS = (from_schema, from_shipped, from_overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_random_recipes_are_understood_or_refused(kind: Callable[[Path, int], None], tmp_path: Path) -> None:
    kind(tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_recipes(kind: Callable[[Path, int], None], tmp_path: Path) -> None:
    kind(tmp_path, MANY)
