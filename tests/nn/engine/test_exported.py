"""The form for export against the literal form, and in graphs whose batch and size are free."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import nn
from torch.export import Dim

from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLinear, share_warehouse
from kw_lightning.nn.engine import exported, reference
from kw_lightning.nn.engine.convolution import Convolution

GEOMETRIES = [
    Convolution((8, 4, 3), (4, 2, 1), (1,), (1,), (1,)),
    Convolution((8, 4, 3, 3), (4, 2, 1, 1), (1, 1), (1, 1), (1, 1)),
    Convolution((8, 4, 3, 2), (8, 4, 3, 2), (2, 1), (0, 2), (1, 2)),
    Convolution((8, 2, 3, 3), (4, 2, 1, 1), (2, 2), (1, 1), (1, 1), 2),
    Convolution((6, 1, 3, 3), (6, 1, 1, 1), (2, 2), (1, 1), (1, 1), 6),
    Convolution((6, 1, 5, 4), (6, 1, 1, 1), (1, 2), (2, 1), (1, 1), 6),
    Convolution((4, 4, 2, 3, 1), (2, 2, 1, 1, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1)),
]


@pytest.mark.parametrize("convolution", GEOMETRIES, ids=str)
def test_it_computes_what_the_literal_form_does(convolution: Convolution) -> None:
    torch.manual_seed(0)
    spatial, out_groups, in_groups = convolution.grid
    mixtures, cells = torch.Size(spatial).numel() * out_groups * in_groups, 5
    x = torch.randn(3, convolution.kernel_shape[1] * convolution.groups, *(9, 7, 6)[: convolution.dimensions]).double()
    attention, store = torch.randn(3, mixtures, cells).double(), torch.randn(cells, *convolution.cell_shape).double()
    expected = reference.convolve(x, attention, store, convolution)
    assert torch.allclose(exported.convolve(x, attention, store, convolution), expected, atol=1e-12)


def network(dimensions: int) -> tuple[nn.Module, int]:
    kind = (KWConv1d, KWConv2d, KWConv3d)[dimensions - 1]
    layers = [kind(4, 8, 3, padding=1), kind(8, 8, 3, stride=2, padding=1, groups=2)]
    share_warehouse(layers, budget=1, name="convolutions")
    head = KWLinear(8, 8)
    share_warehouse([head], budget=2, name="head")
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1](1)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], pool, nn.Flatten(), head).eval(), dimensions


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_graphs_take_every_batch_and_size_and_hold_no_operator_of_ours(dimensions: int) -> None:
    torch.manual_seed(0)
    model, _ = network(dimensions)
    free = dict.fromkeys((0, *range(2, 2 + dimensions)), Dim.DYNAMIC)
    sample = torch.randn(2, 4, *[8] * dimensions)
    program = torch.export.export(model, (sample,), dynamic_shapes=(free,))
    calls = {str(node.target): len(node.args) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("kw_lightning" in name for name in calls)
    assert {count < 7 for name, count in calls.items() if "conv" in name} == {True}  # the seventh would be the groups
    ranks = [node.meta["val"].dim() for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(ranks) <= 6  # as XNNPACK takes
    for batch, side in itertools.product((1, 5), (8, 11)):
        x = torch.randn(batch, 4, *[side] * dimensions)
        with torch.no_grad():
            assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_exporter_of_onnx_by_tracing_takes_it(dimensions: int) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, _ = network(dimensions)
    file = io.BytesIO()
    free = {axis: f"side {axis}" for axis in (0, *range(2, 2 + dimensions))}
    sample = torch.randn(2, 4, *[8] * dimensions)
    torch.onnx.export(
        model, (sample,), file, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes={"x": free}
    )
    session = runtime.InferenceSession(file.getvalue())
    for batch, side in itertools.product((1, 5), (8, 11)):
        x = torch.randn(batch, 4, *[side] * dimensions)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model(x))
