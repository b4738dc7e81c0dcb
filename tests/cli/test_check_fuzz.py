"""`kw check` on random recipes, their networks included: mistakes or none, but no traceback and no hang.

The continuous integration runs `FEW` cases of each kind; `pytest -m slow tests/cli/test_check_fuzz.py` runs `MANY`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kw_lightning.cli.check import problems_of
from kw_lightning.recipe.sources import names
from kw_lightning.recipe.writing import to_yaml

sys.path.append(str(Path(__file__).parents[1] / "recipe"))
from strategies import JUNK, TEXTS, broken_files, valid

from kw_lightning.recipe.schema import at

FEW = 25
MANY = 10_000
SECONDS = 10.0
"""CPU time of one case: the network is planned, and where a stranger's file is refused that takes under a second."""

LAYERS = ("features.0", "features.3.squeeze", "features.*.expand3x3", "classifier.1", "*", "features.[!0]*", "fc[1/2:]")
BACKBONES = ("torchvision/squeezenet1_1", "torchvision/squeezenet1_0", "torchvision/squeezenet", "python:os:system")


def hold(file: Path) -> None:
    start = time.process_time()
    problems = problems_of(str(file))
    assert time.process_time() - start < SECONDS
    for line in map(str, problems):
        assert line.splitlines() == [line], "one mistake is one line"
        assert line.isprintable()


def networks_from_schema(folder: Path, count: int) -> None:
    def part(*keys: str) -> st.SearchStrategy[Any]:
        found = at(keys)
        assert found is not None
        return valid(found, 2)

    selectors = st.lists(
        st.sampled_from(LAYERS) | TEXTS | part("warehouses", "a", "layers").map(str), min_size=1, max_size=3
    )
    conditions = st.fixed_dictionaries(
        {"name": st.sampled_from(LAYERS)},
        optional={"kernel_size": st.integers(1, 3), "min_channels": st.integers(1, 600), "type": st.just("Conv2d")},
    )
    warehouse = st.fixed_dictionaries(
        {"layers": selectors | st.lists(conditions, min_size=1, max_size=2)},
        optional={key: part("defaults", key) for key in ("budget", "cell", "attention")},
    )
    model = st.fixed_dictionaries(
        {"backbone": st.sampled_from(BACKBONES)},
        optional={
            "args": st.dictionaries(st.sampled_from(("num_classes", "dropout", "version")) | TEXTS, JUNK, max_size=2),
            "input": st.lists(st.integers(1, 70), min_size=1, max_size=4) | st.just([3, 64, 64]),
            "budget": part("model", "budget"),
            "pretrained": st.booleans(),
        },
    )
    recipes = st.fixed_dictionaries(
        {"kw": st.just(1), "model": model},
        optional={
            "warehouses": st.dictionaries(st.sampled_from("ab"), warehouse, min_size=1, max_size=2),
            "stages": part("stages"),
            "defaults": part("defaults"),
        },
    )
    file = folder / "recipe.yaml"

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes)
    def run(data: dict[str, Any]) -> None:
        try:
            text = to_yaml(data).encode()
        except UnicodeEncodeError:
            return
        file.write_bytes(text)
        hold(file)

    run()


def broken_shipped_recipes(folder: Path, count: int) -> None:
    small = [source for name, source in names().items() if "digits" in name or name.startswith("keras-resnet")]
    assert len(small) > 2
    file = folder / "recipe.yaml"

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(broken_files(small))
    def run(content: bytes) -> None:
        file.write_bytes(content)
        hold(file)

    run()


KINDS = (networks_from_schema, broken_shipped_recipes)


@pytest.mark.parametrize("kind", KINDS)
def test_random_recipes_are_checked_without_a_traceback(kind: Callable[[Path, int], None], tmp_path: Path) -> None:
    kind(tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_recipes(kind: Callable[[Path, int], None], tmp_path: Path) -> None:
    kind(tmp_path, MANY)
