"""The order of a network's layers: each after those whose output it takes."""

from __future__ import annotations

import pytest

from kw_lightning.keras.ordering import in_order


@pytest.mark.parametrize(
    ("waits", "order", "cycle"),
    [
        ({}, [], []),
        ({"a": (), "b": ("a",), "c": ("b",)}, ["a", "b", "c"], []),
        ({"sum": ("left", "right"), "left": (), "right": ("left",)}, ["left", "right", "sum"], []),
        ({"a": (), "b": ("b", "c"), "c": ("a",)}, ["a", "c"], ["b", "b"]),
        ({"a": ("c",), "b": ("a",), "c": ("b",), "d": ("a",), "e": ()}, ["e"], ["a", "b", "c", "a"]),
    ],
    ids=["none", "in order", "out of order", "itself", "a circle and who waits for it"],
)
def test_each_comes_after_those_that_it_waits_for(
    waits: dict[str, tuple[str, ...]], order: list[str], cycle: list[str]
) -> None:
    assert in_order(waits) == (order, cycle)
