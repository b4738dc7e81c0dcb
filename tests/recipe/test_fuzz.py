"""Random recipes and overrides: each is understood, or refused with one line a mistake; no traceback and no hang.

The continuous integration runs `FEW` cases of each kind; `pytest -m slow tests/recipe/test_fuzz.py` runs `MANY` and
prints how many came out how.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from strategies import broken_files, overrides, recipes

sys.path.append(str(Path(__file__).parents[1]))

from fuzzing import MANY, fuzz, hold_lines

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import Recipe, load_recipe, lock_text
from kw_lightning.recipe.writing import to_yaml

FEW = 80
SECONDS = 2.0
"""CPU time of one case, writing and reading it again included."""
CHANGED = ("digits-resnet", "resnet18-kw-1x", "mobilenetv2-100-kw-4x", "keras-deit-tiny-kw-4x")


def understood(source: Any, folder: Path, changes: tuple[str, ...] = ()) -> str:
    """Load a recipe and hold the outcome to what every outcome must be."""
    try:
        recipe = load_recipe(source, changes)
    except RecipeError as error:
        hold_lines(list(map(str, error.problems)))
        return "refused"
    check_locked(recipe, folder)
    return "understood"


def check_locked(recipe: Recipe, folder: Path) -> None:
    """Hold a recipe to the same meaning after it is written resolved, and after it is locked."""
    file = folder / "locked.yaml"
    file.write_text(lock_text(recipe), encoding="utf-8")
    again = load_recipe(file)
    assert json.dumps(again.document.data) == json.dumps(recipe.document.data)
    assert again.warehouses == recipe.warehouses
    assert to_yaml(recipe.document.data, lambda path: path or None).count("\n") > 0


def file_understood(content: bytes, folder: Path) -> str:
    file = folder / "broken.yaml"
    file.write_bytes(content)
    return understood(file, folder)


def changes_understood(case: tuple[Any, list[str]], folder: Path) -> str:
    source, changes = case
    return understood(source, folder, tuple(changes))


SMALL = {"kw": 1, "warehouses": {"a": {"layers": ["x"]}}}
KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], str]]] = {
    "recipes from the schema": (recipes(), understood),
    "broken recipe files": (broken_files(), file_understood),
    "overrides": (
        st.tuples(st.sampled_from((SMALL, *CHANGED)), st.lists(overrides(), min_size=1, max_size=3)),
        changes_understood,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_recipes_are_understood_or_refused(kind: str, tmp_path: Path) -> None:
    cases, try_one = KINDS[kind]
    outcomes = fuzz(kind, cases, partial(try_one, folder=tmp_path), FEW, SECONDS)
    assert outcomes.keys() == {"understood", "refused"}  # cases of which all are refused would show little


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_recipes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, try_one = KINDS[kind]
    fuzz(kind, cases, partial(try_one, folder=tmp_path), MANY, SECONDS, capsys)
