"""Where dimension 0 is not the batch: no sample changes another's output or gradient, and doubts are said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.builder import convert
from kw_lightning.nn import KWLinear, set_temperature, share_warehouse
from kw_lightning.recipe import load_recipe


def dynamic(network: nn.Module, layers: list[str], **keys: Any) -> nn.Module:
    """Return a network with these layers in a warehouse; dropout off, attention at work."""
    recipe = load_recipe({"kw": 1, "name": "test", "warehouses": {"mlp": {"layers": layers, **keys}}})
    torch.manual_seed(0)
    convert(network.double(), recipe)
    set_temperature(network, 0.2)
    return network.eval()


class ConformerBlock(nn.Module):
    """Half an MLP, attention, a convolution over time and half an MLP on [batch, time, channels], as torchaudio's.

    Inside it works on [time, batch, channels], as its attention does.
    """

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.before, self.after = self._mlp(channels), self._mlp(channels)
        self.attention = nn.MultiheadAttention(channels, 2)
        self.convolution = nn.Sequential(
            nn.Conv1d(channels, 2 * channels, 1),
            nn.GLU(1),
            nn.Conv1d(channels, channels, 3, padding=1, groups=channels),
        )
        self.norm = nn.LayerNorm(channels)

    @staticmethod
    def _mlp(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 16), nn.SiLU(), nn.Linear(16, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, channels]."""
        x = x.transpose(0, 1)
        x = x + 0.5 * self.before(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.convolution(x.permute(1, 2, 0)).permute(2, 0, 1)
        return self.norm(x + 0.5 * self.after(x)).transpose(0, 1)


def encoder_layer() -> nn.Module:
    """Return torch's encoder layer as it is by default: on [time, batch, channels]."""
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)


CASES = [
    (ConformerBlock, ["before.?", "after.?"], 0),
    (encoder_layer, ["linear?"], 1),
]


def leak(network: nn.Module, batch: int) -> tuple[float, float]:
    """Return how much another sample changes the first one's output, and how much of its gradient leads there."""
    torch.manual_seed(1)
    x = torch.randn(5, 5, 8, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone()
    other.select(batch, 3).normal_()
    first = network(x).select(batch, 0)
    (first * torch.randn_like(first)).sum().backward()
    difference = (network(other).select(batch, 0) - first).detach().abs().max()
    assert x.grad is not None
    others = x.grad.index_select(batch, torch.arange(1, 5))
    return float(difference), float(others.abs().max())


@pytest.mark.filterwarnings("ignore:.*takes dimension 0")
@pytest.mark.parametrize(("make", "layers", "batch"), CASES)
def test_samples_mix_without_batch_dim_and_do_not_with_it(
    make: Callable[[], nn.Module], layers: list[str], batch: int
) -> None:
    assert leak(make().double().eval(), batch) == (0, 0)
    difference, gradient = leak(dynamic(make(), layers), batch)
    assert difference > 1e-4
    assert gradient > 1e-4
    assert leak(dynamic(make(), layers, batch_dim=1), batch) == (0, 0)


@pytest.mark.parametrize(("make", "layers", "batch"), CASES)
def test_every_sample_gets_what_it_gets_alone(make: Callable[[], nn.Module], layers: list[str], batch: int) -> None:
    network = dynamic(make(), layers, batch_dim=1)
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    alone = [network(sample) for sample in x.split(1, dim=batch)]
    torch.testing.assert_close(network(x), torch.cat(alone, dim=batch), rtol=1e-12, atol=1e-12)


def test_a_layer_with_its_batch_elsewhere_is_the_layer_with_its_batch_first() -> None:
    torch.manual_seed(0)
    here = KWLinear(4, 6, dtype=torch.float64, batch_dim=2)
    share_warehouse([here], dtype=torch.float64)
    set_temperature(here.eval(), 0.3)
    x = torch.randn(5, 3, 7, 4, dtype=torch.float64)
    found = here(x)
    tokens = here(x[0, :, 0])  # fewer dimensions: one sample, of three tokens
    here.batch_dim = 0
    assert torch.equal(found, here(x.movedim(2, 0)).movedim(0, 2))
    assert torch.equal(tokens, here(x[0, :, 0].unsqueeze(0)).squeeze(0))
    assert "batch_dim" not in repr(here)
    assert "batch_dim=1" in repr(KWLinear(4, 6, batch_dim=1))
    with pytest.raises(ValueError, match="batch_dim is a dimension, 0 or more: found -1"):
        KWLinear(4, 6, batch_dim=-1)


@pytest.mark.parametrize(
    ("make", "layers", "neighbour"), [(CASES[0][0], CASES[0][1], "attention"), (CASES[1][0], CASES[1][1], "self_attn")]
)
def test_where_no_input_is_known_one_warning_names_the_layer_and_the_key(
    make: Callable[[], nn.Module], layers: list[str], neighbour: str
) -> None:
    network, x = dynamic(make(), layers), torch.randn(5, 3, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="takes dimension 0") as caught:
        [network(x) for _ in range(2)]
    assert len(caught) == 1
    name = "before.1" if neighbour == "attention" else "linear1"
    shape = "[3, 5, 8]" if neighbour == "attention" else "[5, 3, 8]"
    assert str(caught[0].message) == (
        f'"{name}" takes dimension 0 of {shape} for the batch, and stands beside "{neighbour}", which works on '
        "[sequence, batch, channels]. If the layer does too, its samples are mixed up: say batch_dim: 1 in warehouse "
        '"mlp". If it does not, say batch_dim: 0'
    )


def quiet(network: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(x)


def test_no_warning_where_the_batch_is_said_or_first_or_without_tokens() -> None:
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    for batch_dim in (0, 1):
        quiet(dynamic(encoder_layer(), ["linear?"], batch_dim=batch_dim), x)
    quiet(dynamic(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ["linear?"]), x)
    quiet(dynamic(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["*"]), x)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = encoder_layer(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(0))

    quiet(dynamic(Pooled(), ["head"]), x)


def test_no_warning_where_the_forward_pass_has_shown_the_batch() -> None:
    class BatchFirst(nn.Module):
        """Turns the sequence first around its attention only."""

        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1)
            return self.mlp(self.attention(y, y, y, need_weights=False)[0].transpose(0, 1))

    network = BatchFirst().double()
    convert(network, {"kw": 1, "name": "t", "model": {"input": [3, 8]}, "warehouses": {"a": {"layers": ["mlp"]}}})
    quiet(network.eval(), torch.randn(5, 3, 8, dtype=torch.float64))


@pytest.mark.parametrize("batch_dim", [None, 0, 1])
def test_a_network_that_takes_the_sequence_first_itself_is_not_refused_for_saying_so(batch_dim: int | None) -> None:
    said = {} if batch_dim is None else {"batch_dim": batch_dim}
    warehouses = {"mlp": {"layers": ["linear?"], **said}}
    network = encoder_layer().double()
    convert(network, {"kw": 1, "name": "t", "model": {"input": [3, 8]}, "warehouses": warehouses})
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    if batch_dim is None:
        with pytest.warns(UserWarning, match="takes dimension 0"):
            network(x)
    else:
        quiet(network, x)
