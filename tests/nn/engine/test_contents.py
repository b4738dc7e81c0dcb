"""Whether tensors hold what they held: changes that PyTorch counts, and those that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn.engine import contents
from kw_lightning.nn.engine.contents import contents_of, place

LARGE = (24, 128, 128, 1)
SMALL = (4, 8, 3)


def double(cells: nn.Parameter) -> None:
    with torch.no_grad():
        cells.mul_(2)


def double_past_the_version(cells: nn.Parameter) -> None:
    cells.data.mul_(2)


def swap_two_cells_past_the_version(cells: nn.Parameter) -> None:
    cells.data[[0, 1]] = cells.data[[1, 0]]


def write_through_numpy(cells: nn.Parameter) -> None:
    cells.detach().numpy()[:, 0] = 0


def change_one_number_past_the_version(cells: nn.Parameter) -> None:
    cells.data[1, 2, 1] += 1


WHOLE = (double, double_past_the_version, swap_two_cells_past_the_version, write_through_numpy)


def readings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that are read whole from now on."""
    read: list[tuple[int, ...]] = []
    real = contents._read

    def noted(tensor: Tensor) -> Tensor:
        read.append(tuple(tensor.shape))
        return real(tensor)

    monkeypatch.setattr(contents, "_read", noted)
    return read


@pytest.mark.parametrize("change", WHOLE)
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_change_of_many_numbers_is_seen_by_the_next_reader_whoever_it_is(
    change: Callable[[nn.Parameter], None], shape: tuple[int, ...]
) -> None:
    cells, readers = nn.Parameter(torch.randn(shape)), torch.zeros(2)
    before = contents_of(cells, readers[:1]), place(cells)
    assert torch.equal(before[0], contents_of(cells, readers[:1]))
    change(cells)
    after = contents_of(cells, readers[1:]), place(cells)
    assert before[1] != after[1] or not torch.equal(before[0], after[0])


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_change_of_one_number_is_seen_by_the_next_pass(shape: tuple[int, ...]) -> None:
    cells, readers = nn.Parameter(torch.randn(shape)), [torch.zeros(1) for _ in range(3)]
    before = [contents_of(cells, reader) for reader in readers]
    assert all(torch.equal(before[0], other) for other in before)
    change_one_number_past_the_version(cells)
    after = [contents_of(cells, reader) for reader in readers]
    assert not any(torch.equal(before[0], other) for other in after)


def test_the_readers_of_a_pass_read_large_cells_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = readings(monkeypatch)
    cells, readers = nn.Parameter(torch.randn(LARGE)), [torch.zeros(1) for _ in range(4)]
    for _ in range(3):
        for reader in readers:
            contents_of(cells, reader)
    assert read == [LARGE] * 3
    contents_of(cells.view(24, 128, 128), readers[0])  # as linear layers ask, by a view of their own
    contents_of(cells.view(24, 128, 128), readers[1])
    assert len(read) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_asks_for_no_gradient_and_keeps_no_tensor_alive(mode: Callable[[], Any]) -> None:
    known = len(contents._readings)
    cells, reader = nn.Parameter(torch.randn(LARGE)), torch.zeros(1)
    with mode():
        assert not contents_of(cells, reader).requires_grad
    assert len(contents._readings) == known + 1
    del cells
    assert len(contents._readings) == known
