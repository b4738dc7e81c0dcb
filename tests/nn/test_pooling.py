"""Max pooling a dimension at a time: the numbers and the layout of PyTorch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import pooling
from kw_lightning.nn.pooling import max_pool


class CalledError(Exception):
    """Raised where PyTorch's own pooling is called."""


def by_maxima(monkeypatch: pytest.MonkeyPatch, pool: nn.Module, x: Tensor) -> bool:
    """Compare a pooling with PyTorch's, and return whether it was one maximum a dimension."""
    expected = pool(x)
    found = max_pool(pool, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()
    with monkeypatch.context() as patch:
        patch.setattr(type(pool), "forward", lambda *_: (_ for _ in ()).throw(CalledError))
        try:
            max_pool(pool, x)
        except CalledError:
            return False
    return True


def test_windows_of_all_sides_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = []
    for kernel, stride, padding, size in itertools.product(
        (2, 3, (2, 3), 5), (1, 2, 3), (0, 1, 2), ((7, 8), (1, 5), (9, 4), (3, 3))
    ):
        x = torch.randn(2, 3, *size)
        x[0, 0, 0, 0], x[1, 1, -1, -1] = float("nan"), float("-inf")
        pool = nn.MaxPool2d(kernel, stride, padding)
        try:
            pool(x)
        except RuntimeError:  # a window is larger than the map, or mostly padding
            continue
        found.append(by_maxima(monkeypatch, pool, x))
    assert found.count(True) > 50
    assert by_maxima(monkeypatch, nn.MaxPool3d(3, 2, 1), torch.randn(2, 3, 5, 6, 7))


def test_what_is_not_plain_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 7, 6)
    assert by_maxima(monkeypatch, nn.MaxPool2d(2), x)
    heard = nn.MaxPool2d(2)
    heard.register_forward_hook(lambda *_: None)
    last = x.contiguous(memory_format=torch.channels_last)
    others = [nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(3, ceil_mode=True), nn.MaxPool2d(1), heard]
    assert not any(by_maxima(monkeypatch, pool, x) for pool in others)
    assert not any(
        by_maxima(monkeypatch, nn.MaxPool2d(2), each) for each in (last, x[0], x[:0], x.double(), x[..., ::2])
    )
    assert not pooling.is_max_pool(nn.MaxPool2d(2, return_indices=True))
