"""Which layers share a warehouse, so that no attention outgrows its cells."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import recipe
from torch import nn

from kw_lightning.planning import plan
from kw_lightning.planning.network import survey
from kw_lightning.planning.selection import Choice
from kw_lightning.planning.sharing import AIM, LEAST_CELLS, Share, share, size_of
from kw_lightning.recipe.types import Attention, Cell


def choices(*layers: nn.Module) -> list[Choice]:
    """Return layers as what a warehouse can take."""
    return [Choice(layer) for layer in survey(nn.Sequential(*layers)).layers]


def shared(*layers: nn.Module) -> list[list[str]]:
    """Return the names of the layers of each warehouse."""
    found, _ = share(choices(*layers), Cell(), Attention())
    return [[choice.name for choice in part.choices] for part in found]


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, groups=groups, device="meta")


@pytest.mark.parametrize("basis", [None, Fraction(1, 16)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_sizes_are_those_of_the_plan(norm: str, basis: Fraction | None) -> None:
    model = nn.Sequential(conv(64, 96), conv(96, 32, 1), conv(32, 64))
    attention = Attention(Fraction(1, 8), norm, basis)  # type: ignore[arg-type]
    written = {"reduction": "1/8", "norm": norm, "basis": "none" if basis is None else "1/16"}
    (warehouse,) = plan(recipe(["*"], defaults={"attention": written}), model).warehouses
    size = size_of(choices(*model), Cell(), attention)
    assert size is not None
    assert size.cells == warehouse.partition.cells
    assert size.cell_parameters == warehouse.cell_parameters
    assert size.attention_parameters == warehouse.attention_parameters


def test_layers_that_fit_together_stay_together() -> None:
    assert shared(conv(64, 64), conv(64, 64), conv(64, 128), conv(64, 128, 1)) == [["0", "1", "2", "3"]]


def test_layers_of_like_width_are_grouped_when_the_whole_would_outgrow_its_cells() -> None:
    layers = [conv(64, 256, 1), conv(256, 64, 1), conv(60, 240, 1), conv(240, 60, 1), conv(64, 256, 1)]
    found, left = share(choices(*layers), Cell(), Attention())
    assert left == []
    assert {tuple(choice.name for choice in part.choices): part.suffix for part in found} == {
        ("0", "4"): "-widen64",
        ("2",): "-widen60",
        ("1",): "-narrow64",
        ("3",): "-narrow60",
    }


def test_many_layers_of_one_shape_are_cut_into_runs_of_like_length() -> None:
    found = shared(*(conv(128, 32) for _ in range(48)))
    assert [len(names) for names in found] == [9, 10, 9, 10, 10]
    assert [name for names in found for name in names] == [str(number) for number in range(48)]


def test_narrow_layers_get_whole_kernels_as_cells() -> None:
    (found,), left = share(choices(*(conv(8, 8) for _ in range(6))), Cell(), Attention())
    assert (found.cell.spatial, len(found.choices), left) == ("whole", 6, [])


def test_many_unlike_layers_get_a_low_rank_attention_rather_than_a_warehouse_each() -> None:
    inputs = range(512, 1024, 32)  # a dense block
    found, left = share(choices(*(conv(channels, 128, 1) for channels in inputs)), Cell(), Attention())
    assert left == []
    assert len(found) < len(inputs) / 2
    assert {part.attention for part in found} != {Attention()}


def test_layers_that_nothing_helps_are_left() -> None:
    found, left = share(choices(conv(96, 96, 3, groups=96), conv(192, 192, 3, groups=192)), Cell(), Attention())
    assert (found, [choice.name for choice in left]) == ([], ["0", "1"])


def test_a_single_layer_is_cut_into_cells_to_choose_from() -> None:
    (found,), _ = share(choices(conv(128, 256, 1)), Cell(), Attention())
    size = size_of(found.choices, found.cell, found.attention)
    assert size is not None
    assert size.cells >= LEAST_CELLS


def test_what_the_recipe_says_of_cells_and_attention_is_kept() -> None:
    asked = Attention(Fraction(1, 8), "layer", Fraction(1, 4), at_most=3)
    found, _ = share(choices(conv(64, 64), conv(64, 64)), Cell(Fraction(1, 2), Fraction(1, 2), "whole"), asked)
    assert [(part.attention, part.cell.spatial) for part in found] == [(asked, "whole")]


@given(
    st.lists(
        st.tuples(st.integers(1, 48), st.integers(1, 48), st.sampled_from([1, 3]), st.sampled_from([1, 4])),
        min_size=1,
        max_size=12,
    )
)
def test_every_layer_is_shared_in_proportion_or_left(shapes: list[tuple[int, int, int, int]]) -> None:
    layers = choices(*(conv(4 * i * unit, 4 * o * unit, kernel) for i, o, kernel, unit in shapes))
    found, left = share(layers, Cell(), Attention())
    assert sorted(c.name for part in [*found, Share(tuple(left), Cell(), Attention())] for c in part.choices) == sorted(
        c.name for c in layers
    )
    assert len({part.suffix for part in found}) == len(found)
    order = {choice.name: index for index, choice in enumerate(layers)}
    for part in found:
        size = size_of(part.choices, part.cell, part.attention)
        assert size is not None
        assert size.fits(Fraction(1))
        assert size.cells >= LEAST_CELLS
        assert all(order[a.name] < order[b.name] for a, b in pairwise(part.choices))
    assert size_of(layers, Cell(), Attention()) is not None
    assert math.isclose(AIM, 0.5)
