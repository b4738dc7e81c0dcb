"""The clock, and what it replays."""

from __future__ import annotations

import time

import pytest
import torch

from kw_lightning.nn.clock import captured, elapsed


def test_a_function_takes_the_time_that_passes() -> None:
    assert elapsed(lambda: time.sleep(0.02), torch.device("cpu")) >= 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_was_captured_is_done_again_on_every_replay() -> None:
    total = torch.zeros(3, device="cuda")
    replay = captured(lambda: total.add_(1))  # once to get ready; recording does nothing
    replay()
    replay()
    torch.cuda.synchronize()
    assert total.tolist() == [3, 3, 3]
