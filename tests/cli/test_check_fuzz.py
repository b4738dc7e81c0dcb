"""`kw check` on random recipes, their networks included: mistakes or none, but no traceback and no hang.

The continuous integration runs `FEW` cases of each kind; `pytest -m slow tests/cli/test_check_fuzz.py` runs `MANY` and
prints how many came out how.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from kw_lightning.cli.check import problems_of
from kw_lightning.recipe.sources import names
from kw_lightning.recipe.writing import to_yaml

sys.path.append(str(Path(__file__).parents[1] / "recipe"))
from strategies import JUNK, TEXTS, broken_files, valid

sys.path.append(str(Path(__file__).parents[1]))
from fuzzing import MANY, fuzz, hold_lines

from kw_lightning.recipe.schema import at

FEW = 25
SECONDS = 10.0
"""CPU time of one case: the network is planned, and where a stranger's file is refused that takes under a second."""

LAYERS = ("features.0", "features.3.squeeze", "features.*.expand3x3", "classifier.1", "*", "features.[!0]*", "fc[1/2:]")
BACKBONES = ("torchvision/squeezenet1_1", "torchvision/squeezenet1_0", "torchvision/mnasnet0_5", "python:os:system")


def checked(content: bytes, folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    problems = problems_of(str(file))
    if problems:
        hold_lines(list(map(str, problems)))
    return "refused" if problems else "understood"


def written(data: dict[str, Any]) -> bytes | None:
    """Return a recipe as a file; None for texts that no file can hold."""
    try:
        return to_yaml(data).encode()
    except UnicodeEncodeError:
        return None


def networks_from_schema() -> st.SearchStrategy[bytes]:
    def part(*keys: str) -> st.SearchStrategy[Any]:
        found = at(keys)
        assert found is not None
        return valid(found, 2)

    # Mostly right in the language, so that the network is reached; the language alone is fuzzed in tests/recipe.
    right = {
        "budget": st.sampled_from((1, "1/2", 0.1, 4, 64, {"cells": 5}, {"cells": 10**9}, {"parameters": "100K"})),
        "cell": st.sampled_from(({}, {"out": "1/3"}, {"in": 1e-3}, {"spatial": "whole"}, {"out": 0.5, "in": "1/64"})),
        "attention": st.sampled_from(({}, {"norm": "layer"}, {"basis": "1/8"}, {"reduction": 1e-9, "basis": 1})),
    }
    settings_of = {key: st.one_of(*[values] * 9, part("defaults", key)) for key, values in right.items()}
    selector = st.one_of(*[st.sampled_from(LAYERS)] * 9, TEXTS)
    conditions = st.fixed_dictionaries(
        {"name": st.sampled_from(LAYERS)},
        optional={
            "kernel_size": st.integers(1, 3) | st.just([3, 1]),
            "min_channels": st.integers(1, 600),
            "type": st.sampled_from(("Conv2d", "Linear", "ReLU")),
            "exclude": st.lists(st.sampled_from(LAYERS), max_size=2),
        },
    )
    layers = st.lists(st.one_of(selector, selector, conditions), min_size=1, max_size=3)
    warehouse = st.fixed_dictionaries({"layers": layers}, optional=settings_of)
    arguments = st.dictionaries(st.sampled_from(("num_classes", "dropout", "version")), JUNK, max_size=1)
    model = st.fixed_dictionaries(
        {"backbone": st.sampled_from(BACKBONES)},
        optional={
            "args": st.one_of(st.just({"num_classes": 3}), st.just({}), arguments),
            "input": st.lists(st.integers(1, 70), min_size=1, max_size=4) | st.just([3, 64, 64]),
            "budget": st.sampled_from(({"relative": 1}, {"relative": "1/9"}, {"parameters": "1M"}, {"parameters": 9})),
            "pretrained": st.booleans(),
        },
    )
    recipes = st.fixed_dictionaries(
        {"kw": st.just(1), "model": model},
        optional={
            "warehouses": st.dictionaries(st.sampled_from("ab"), warehouse, min_size=1, max_size=2),
            "stages": st.just("auto") | st.fixed_dictionaries({}, optional=right),
            "defaults": st.fixed_dictionaries({}, optional=settings_of),
        },
    )
    return recipes.map(written).filter(lambda content: content is not None)


def broken_shipped_recipes() -> st.SearchStrategy[bytes]:
    small = [source for name, source in names().items() if "digits" in name or name.startswith("keras-resnet")]
    assert len(small) > 2
    return broken_files(small)


KINDS = (networks_from_schema, broken_shipped_recipes)


@pytest.mark.parametrize("kind", KINDS)
def test_random_recipes_are_checked_without_a_traceback(
    kind: Callable[[], st.SearchStrategy[bytes]], tmp_path: Path
) -> None:
    fuzz(kind.__name__, kind(), lambda content: checked(content, tmp_path), FEW, SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_recipes(
    kind: Callable[[], st.SearchStrategy[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz(kind.__name__, kind(), lambda content: checked(content, tmp_path), MANY, SECONDS, capsys)
