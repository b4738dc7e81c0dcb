"""Memory of the engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kw_lightning.nn import KWConv2d, share_warehouse
from kw_lightning.nn.engine.workspace import HUGE_BYTES, in_huge_pages


def advised(address: int) -> bool:
    """Return whether the mapping of an address was advised to have huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no such mapping")


with_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="no huge pages here",
)


@with_huge_pages
def test_large_memory_is_asked_for_in_huge_pages() -> None:
    large = torch.empty(12 * HUGE_BYTES // 4)
    assert in_huge_pages(large) is large
    assert advised(large.data_ptr() + 2 * HUGE_BYTES)
    assert large.zero_().sum() == 0


@with_huge_pages
def test_the_cells_of_a_large_warehouse_are_in_huge_pages() -> None:
    layer = KWConv2d(1024, 1024, 3)
    share_warehouse([layer], name="stage", budget=1)
    assert layer.warehouse is not None
    cells = layer.warehouse.cells
    assert cells.numel() * cells.element_size() >= 8 * HUGE_BYTES
    assert advised(cells.data_ptr() + cells.numel() * 2)


@pytest.mark.parametrize("shape", [(0,), (3,), (1024, 1024)])
def test_any_memory_stays_what_it_was(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    assert in_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.ones(shape))
