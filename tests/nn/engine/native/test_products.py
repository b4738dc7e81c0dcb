"""Products of rows with one vector, by which large tensors are compared with what they were."""

from __future__ import annotations

import pytest
import torch

from kw_lightning.nn.engine.native import products, row_products


@pytest.mark.parametrize(
    "shape", [(1, 70_000), (3, 1), (5, 63), (7, 64), (2, 65), (300, 1000), (9, 129), (0, 5), (4, 0)]
)
@pytest.mark.parametrize("shared", [0, 2**18])
def test_they_are_those_of_double_precision(
    shape: tuple[int, int], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SHARED", shared)
    rows, other = torch.randn(shape), torch.randn(shape[1])
    torch.testing.assert_close(row_products(rows, other).double(), rows.double() @ other.double(), rtol=1e-4, atol=1e-4)


def test_rows_and_vectors_that_do_not_lie_together_are_taken_too() -> None:
    rows, other = torch.randn(1000, 600).T[::2], torch.randn(2000)[::2]
    torch.testing.assert_close(row_products(rows, other), rows @ other, rtol=1e-4, atol=1e-4)


def test_other_types_and_a_machine_without_a_compiler_take_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, other = torch.randn(600, 1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    assert torch.equal(row_products(rows, other), torch.mv(rows, other))
    monkeypatch.setattr(products, "library", lambda: None)
    assert torch.equal(row_products(rows.float(), other.float()), torch.mv(rows.float(), other.float()))


def test_each_row_is_added_up_alike_whatever_the_threads() -> None:
    rows, other, before = torch.randn(600, 1000), torch.randn(1000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(row_products(rows, other))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
