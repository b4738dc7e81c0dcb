"""Planning looks at the forward pass: weights that are read, layers that nobody calls, and where the batch is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import TinyResNet, recipe
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.builder import convert
from kw_lightning.errors import RecipeError
from kw_lightning.nn import KWLayer
from kw_lightning.planning import find_stages, plan


class Reading(nn.Module):
    """One layer is read, one read beside being called, one asked for its type, one called, one left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.both, self.asked, self.called, self.alone = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 4]."""
        x = F.linear(x, self.read.weight) + self.both(x) * self.both.weight.abs().mean()
        return self.called(self.asked(x.to(self.asked.weight.dtype)))


def reasons(model: nn.Module, *layers: str) -> dict[str, str]:
    planned = plan(recipe(layers), model, input_shape=[4])
    return {static.layer.name: static.reason for static in planned.static_layers}


def test_a_name_of_a_layer_whose_weight_is_read_is_refused() -> None:
    for name, how in (("read", "instead of"), ("both", "beside")):
        message = f'"{name}" cannot be made dynamic: the network reads its weight {how} calling it'
        with pytest.raises(RecipeError) as raised:
            plan(recipe([name]), Reading(), input_shape=[4])
        assert [problem.message for problem in raised.value.problems] == [message]


def test_a_glob_leaves_layers_out_whose_weight_is_read() -> None:
    assert reasons(Reading(), "*") == {
        "read": "the network reads its weight instead of calling it",
        "both": "the network reads its weight beside calling it",
    }
    assert reasons(Reading(), "called")["alone"] == "the forward pass does not call it"
    dynamic = convert(Reading(), recipe(["*"], model={"input": [4, 4]}))
    assert [name for name, module in dynamic.named_modules() if isinstance(module, KWLayer)] == [
        "asked",
        "called",
        "alone",
    ]
    assert dynamic(torch.randn(3, 4)).shape == (3, 4)


class ReadingConvolutions(TinyResNet):
    """A residual network that regularises one of its convolutions in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 1, height, width]."""
        return super().forward(x) + self.layer2[0].conv2.weight.square().sum()


def test_stages_leave_layers_out_whose_weight_is_read() -> None:
    read = {"layer2.0.conv2"}
    plain = {name for stage in find_stages(TinyResNet(), [1, 8, 8]) for name in stage.layers}
    found = {name for stage in find_stages(ReadingConvolutions(), [1, 8, 8]) for name in stage.layers}
    assert read <= plain
    assert found == plain - read
    planned = plan(recipe(stages="auto"), ReadingConvolutions(), input_shape=[1, 8, 8])
    assert {layer.name for warehouse in planned.warehouses for layer in warehouse.layers} == found


class ReadInTraining(nn.Module):
    """Evaluation passes over a layer that training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 4]."""
        return self.main(F.linear(x, self.extra.weight) + self.head(x) if self.training else x)


def test_layers_that_only_training_uses_may_be_called_but_not_read() -> None:
    assert plan(recipe(["main", "head"]), ReadInTraining(), input_shape=[4]).warehouses
    with pytest.raises(RecipeError, match='"extra" cannot be made dynamic: the network reads its weight instead of'):
        plan(recipe(["main", "extra"]), ReadInTraining(), input_shape=[4])


class Adversaries(nn.Module):
    """A generator that `forward` runs, and a discriminator that only the training step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """noise: [batch, 4]."""
        return self.generator(noise)


@pytest.mark.parametrize("layers", [["discriminator.0", "generator.0"], ["*.0"]])
def test_layers_that_forward_does_not_call_can_be_dynamic(layers: list[str]) -> None:
    model = convert(Adversaries(), recipe(layers, model={"input": [4, 4]}))
    planned = plan(recipe(layers), Adversaries(), input_shape=[4])
    assert [layer.name for layer in planned.warehouses[0].layers] == ["generator.0", "discriminator.0"]
    assert model.discriminator(model(torch.randn(3, 4))).shape == (3, 1)


class SequenceFirst(nn.Module):
    """Turns [batch, channels, length] into [length, batch, channels] and back, around an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 4, length]."""
        return self.head(self.narrow(self.wide(x.permute(2, 0, 1)).relu()).mean(0))


def message(layers: Any, **keys: Any) -> str:
    with pytest.raises(RecipeError) as raised:
        plan(recipe({"a": {"layers": layers, **keys}}), SequenceFirst(), input_shape=[4, 5])
    return "\n".join(problem.message for problem in raised.value.problems)


@pytest.mark.parametrize("layers", [["wide", "narrow"], ["*w*"]])
def test_a_batch_that_is_not_dimension_0_is_refused_with_the_key_that_helps(layers: list[str]) -> None:
    assert message(layers) == (
        'samples would mix in "wide": it gets [5, 1, 4] for one sample and [5, 2, 4] for two, so its batch is '
        "dimension 1, not 0; say batch_dim: 1 in the warehouse (and 1 other layers of the warehouse)"
    )
    planned = plan(recipe({"a": {"layers": layers, "batch_dim": 1}}), SequenceFirst(), input_shape=[4, 5])
    first = planned.warehouses[0].layers[0].macs
    assert first is not None
    assert first.static == 5 * 4 * 8


def test_a_batch_that_is_dimension_0_is_told_from_what_the_recipe_says() -> None:
    class BatchFirst(SequenceFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.narrow(self.wide(x.transpose(1, 2)).relu()).mean(1))

    with pytest.raises(RecipeError, match="its batch is dimension 0, not 1; leave batch_dim out of the warehouse"):
        plan(recipe({"a": {"layers": ["wide"], "batch_dim": 1}}), BatchFirst(), input_shape=[4, 5])
    assert plan(recipe({"a": {"layers": ["*"], "batch_dim": 0}}), BatchFirst(), input_shape=[4, 5]).warehouses


def test_a_batch_dimension_is_for_linear_layers() -> None:
    with pytest.raises(
        RecipeError, match='batch_dim is for linear layers: "stem" is a Conv2d, whose batch is dimension 0'
    ):
        plan(recipe({"a": {"layers": ["stem"], "batch_dim": 1}}), TinyResNet())


def test_windows_folded_into_the_batch_are_no_mistake() -> None:
    class Windows(SequenceFirst):
        def forward(self, x: Tensor) -> Tensor:
            windows = x.transpose(1, 2).unflatten(1, (3, 2)).flatten(0, 1)
            return self.narrow(self.wide(windows))

    assert plan(recipe(["wide", "narrow"]), Windows(), input_shape=[4, 6]).warehouses
