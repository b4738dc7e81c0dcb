"""Memory for large gradients of cells: used again once nothing else has it, and never before."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, share_warehouse
from kw_lightning.nn.engine import gradients
from kw_lightning.nn.engine.gradients import gradient_of


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "HUGE_BYTES", 0)


def make_cells() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4, 5))


def test_memory_is_used_again_once_nothing_has_it() -> None:
    cells = make_cells()
    first = gradient_of(cells, torch.float32)
    assert first.shape == cells.shape
    place, part = first.data_ptr(), first[1].view(-1)
    del first
    second = gradient_of(cells, torch.float32)
    assert second.data_ptr() != place  # a part of the first is there still
    del part
    third = gradient_of(cells, torch.float32)
    assert third.data_ptr() not in (place, second.data_ptr())
    place = third.data_ptr()
    del third
    assert gradient_of(cells, torch.float32).data_ptr() == place
    assert gradient_of(cells, torch.float64).dtype == torch.float64
    assert gradient_of(make_cells(), torch.float32).data_ptr() != place


def test_an_array_of_numpy_and_another_tensor_on_it_have_it_too() -> None:
    cells = make_cells()
    held = [gradient_of(cells, torch.float32).numpy()]
    assert gradient_of(cells, torch.float32).data_ptr() != held[0].ctypes.data
    held = [torch.empty(0).set_(gradient_of(cells, torch.float32).untyped_storage())]
    assert gradient_of(cells, torch.float32).data_ptr() != held[0].data_ptr()


def test_memory_that_was_taken_away_is_asked_for_anew() -> None:
    cells = make_cells()
    gradient_of(cells, torch.float32).untyped_storage().resize_(0)
    gradient_of(cells, torch.float32).fill_(1)


def test_it_goes_with_its_cells() -> None:
    cells = make_cells()
    before = len(gradients._last)
    gradient_of(cells, torch.float32)
    assert len(gradients._last) == before + 1
    del cells
    gc.collect()
    assert len(gradients._last) == before


def test_training_has_the_same_gradients_however_long_they_are_kept() -> None:
    torch.manual_seed(0)
    layers = [KWConv2d(16, 16, 3, padding=1) for _ in range(2)]
    share_warehouse(layers, budget=2)
    network, x = nn.Sequential(*layers), torch.randn(3, 16, 5, 5)
    cells = layers[0].warehouse.cells

    def step(scale: float) -> Tensor:
        (found,) = torch.autograd.grad((scale * network(x)).square().sum(), cells)
        return found

    kept = [step(1), step(2), step(3)]
    torch.testing.assert_close(kept[1], 4 * kept[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept[2], 9 * kept[0], rtol=1e-4, atol=1e-4)
    for _ in range(3):
        network.zero_grad()
        for _ in range(2):  # accumulated
            network(x).square().sum().backward()
        torch.testing.assert_close(cells.grad, 2 * kept[0], rtol=1e-4, atol=1e-4)


def test_threads_never_get_the_same() -> None:
    cells, wrong = make_cells(), []

    def work(number: float) -> None:
        for _ in range(300):
            own = gradient_of(cells, torch.float32).fill_(number)
            if not own.eq(number).all():
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(float(number),)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
