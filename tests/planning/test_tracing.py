"""Forward passes on the meta device: of networks that values decide, take several inputs, or ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import recipe
from torch import Tensor, nn

from kw_lightning.planning import plan
from kw_lightning.planning.tracing import trace


class Detects(nn.Module):
    """A backbone, and a head for as many boxes as there are large values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 64, height, width]."""
        x = self.backbone(x)
        return self.head(x.flatten(2).transpose(1, 2)[x.mean(1).flatten(1) > 0])


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, first: Tensor, second: Tensor, steps: int = 2) -> Tensor:
        return self.layer(first) - self.layer(second) * steps


class Remembers(nn.Module):
    """Reads what its own hook has put aside, which it installs once, and leaves a tensor behind, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 4]."""
        if not self.ready:
            self.layer.register_forward_hook(lambda _, __, output: _SEEN.append(output))
            self.ready = True
        self.last = self.layer(x)
        return _SEEN.pop() + self.last


_SEEN: list[Tensor] = []


def test_a_network_whose_way_depends_on_values_is_traced_up_to_there() -> None:
    with torch.device("meta"):
        model = Detects()
    forward = trace(model, [64, 8, 8])
    assert forward.failure is not None
    assert forward.failure.startswith("values decide which way the forward pass goes: ")
    assert list(forward.calls) == ["backbone.0", "backbone.1", "backbone.2", "backbone.3", "backbone"]
    planned = plan(recipe(stages="auto"), model, input_shape=[64, 8, 8])
    assert [layer.name for layer in planned.warehouses[0].layers] == ["backbone.1", "backbone.2", "backbone.3"]
    assert (planned.macs, planned.macs_note) == (None, forward.failure)


def test_a_wrong_input_is_no_matter_of_values() -> None:
    forward = trace(Detects(), [3, 8, 8])
    assert (forward.calls, str(forward.failure)[:45]) == ({}, "the network does not run on one input of [3, ")


def test_networks_of_several_inputs_get_as_many() -> None:
    forward = trace(Flow(), [3, 8, 8])
    assert forward.failure is None
    assert len(forward.calls["layer"]) == 2


def test_a_network_that_ran_before() -> None:
    model = Remembers()
    assert trace(model, [4]).failure is None
    model(torch.rand(1, 4))
    assert trace(model, [4]).failure is None
    assert model.last.grad_fn is not None


def test_segformer_that_ran_before() -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 1, 2, 2]}
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes, decoder_hidden_size=32))
    model.eval()(torch.rand(1, 3, 64, 64))
    assert plan(recipe(stages="auto"), model, input_shape=[3, 64, 64]).macs is not None
