"""What takes a network's graph: torch.fx sees dynamic layers as leaves, tracing and export run, scripting says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from kw_lightning.nn import KWConv1d, KWConv2d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.partial import PartialLayer


class Network(nn.Module):
    """A convolution whose input may lack the batch, a projection of which a third is dynamic, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = KWConv2d(3, 8, 3, padding=1)
        self.project = PartialLayer([nn.Linear(8, 16), KWLinear(8, 8)])
        self.head = KWLinear(24, 5)
        share_warehouse([self.conv])
        share_warehouse([self.project.parts[1], self.head])

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, height, width]."""
        return self.head(self.project(self.conv(x).relu().flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network().eval()
    set_temperature(network, 0.3)
    return network


def test_feature_extractors_take_dynamic_layers_without_arguments(network: Network) -> None:
    x = torch.randn(2, 3, 6, 6)
    found = create_feature_extractor(network, {"conv": "maps", "project.parts.1": "values", "head": "scores"})(x)
    maps = network.conv(x)
    assert torch.equal(found["maps"], maps)
    assert torch.equal(found["values"], network.project.parts[1](maps.relu().flatten(2).transpose(1, 2)))
    assert torch.equal(found["scores"], network(x))


def test_symbolic_tracing_keeps_dynamic_layers_as_modules_with_their_weights(network: Network) -> None:
    traced = torch.fx.symbolic_trace(network)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "project.parts.0", "project.parts.1", "head"]
    assert {id(p) for p in traced.parameters()} == {id(p) for p in network.parameters()}
    x = torch.randn(3, 3, 6, 6, requires_grad=True)
    traced(x).sum().backward()
    assert network.conv.warehouse.cells.grad.abs().sum() > 0


class Biased(nn.Module):
    """Adds to its input what layers make of a constant, as Swin's relative position bias is made."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 3))
        self.bias = KWLinear(3, 8)
        self.smooth = KWConv1d(8, 8, 3, padding=1)
        share_warehouse([self.bias])
        share_warehouse([self.smooth], dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [8, 8]."""
        return x + self.bias(self.table) + self.smooth(self.table @ self.table.T)


def test_symbolic_tracing_keeps_layers_whose_input_is_a_constant() -> None:
    torch.manual_seed(0)
    network, x = Biased(), torch.randn(8, 8)
    traced = torch.fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["bias", "smooth"]
    with torch.no_grad():
        network.smooth.warehouse.cells.mul_(2)
        network.bias.warehouse.cells.mul_(2)
    torch.testing.assert_close(traced(x), network(x))


@pytest.mark.filterwarnings("ignore")
def test_tracing_and_export_serve_other_batches(network: Network) -> None:
    x, other = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)
    traced = torch.jit.trace(network, x)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for graph in (traced, exported):
            torch.testing.assert_close(graph(other), network(other))


@pytest.mark.filterwarnings("ignore")
def test_scripting_says_that_tracing_and_export_are_the_way(network: Network) -> None:
    with pytest.raises(NotImplementedError) as raised:
        torch.jit.script(network)
    assert str(raised.value) == (
        "KWConv2d has no TorchScript: use torch.export.export(network, (example,)); files of "
        "torch.jit.trace(network, example) need kw_lightning where they are loaded, those of kw export do not"
    )
