"""In evaluation a sample's result does not depend on its neighbours: how many there are, nor what they hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import ENGINES, Convolution, computing
from kw_lightning.nn.engine.paths import PATHS
from kw_lightning.nn.engine.paths import Path as EnginePath
from kw_lightning.nn.engine.problem import Problem

sys.path.append(str(Path(__file__).parent / "engine"))

from geometries import suited

TOLERANCE = 1e-6  # relative to the largest number
BATCH = 5
GEOMETRIES = {
    "3×3": Convolution((40, 48, 3, 3), (20, 24, 1, 1), (1, 1), (1, 1), (1, 1)),
    "1×1": Convolution((64, 32, 1, 1), (32, 32, 1, 1), (1, 1), (0, 0), (1, 1)),
    "strided": Convolution((32, 16, 3, 3), (16, 16, 1, 1), (2, 2), (1, 1), (1, 1)),
    "one dimension": Convolution((24, 24, 5), (12, 8, 1), (1,), (2,), (1,)),
}


def assert_alone(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Assert that each sample gives the same alone, with others, and beside samples that are no numbers."""
    together = compute(x)
    largest = together.abs().max()
    assert largest > 0
    for index in range(len(x)):
        for beside in (x[index : index + 1], _spoilt(x, index)):
            alone = compute(beside)[0 if len(beside) == 1 else index]
            assert (alone - together[index]).abs().max() <= TOLERANCE * largest


def _spoilt(x: Tensor, index: int) -> Tensor:
    others = torch.full_like(x, torch.nan)
    others[::2] = torch.inf
    others[index] = x[index]
    return others


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_no_path_mixes_samples(path: EnginePath, name: str, last: bool) -> None:
    convolution = suited(path.name, GEOMETRIES[name])
    dtype = next(
        (
            dtype
            for dtype in (torch.float64, torch.float32)
            if path.refusal(Problem(convolution, BATCH, (9,), 11, dtype, torch.device("cpu"))) is None
        ),
        None,
    )
    if dtype is None:
        pytest.skip(f"{path.name} needs a C compiler and a convolution that it can compute")
    generator = torch.Generator().manual_seed(0)
    mixtures = math.prod(convolution.kernel_shape) // math.prod(convolution.cell_shape)
    channels, size = convolution.kernel_shape[1] * convolution.groups, (9,) * convolution.dimensions
    x, attention, cells = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((BATCH, channels, *size), (BATCH, mixtures, 11), (11, *convolution.cell_shape))
    )
    # The attention of a sample travels with it.
    both = torch.cat([x.flatten(1), attention.flatten(1)], 1)

    def compute(both: Tensor) -> Tensor:
        x, attention = both.split([channels * math.prod(size), mixtures * 11], 1)
        x = x.reshape(-1, channels, *size)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        return computing.forward(x, attention.reshape(-1, mixtures, 11), cells, convolution, path)

    assert_alone(compute, both)


def make_network(engine: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [KWConv2d(3, 16, 3, padding=1), KWConv2d(16, 16, 3, padding=1, stride=2), KWConv2d(16, 32, 1)]
    head = KWLinear(32, 10)
    share_warehouse(layers[:2])
    share_warehouse(layers[2:])
    share_warehouse([head])
    for layer in (*layers, head):
        layer.engine = engine
    normed = [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]
    network = nn.Sequential(*normed, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).to(dtype)
    set_temperature(network, 0.3)
    network(torch.randn(8, 3, 8, 8, dtype=dtype))  # gives the norms statistics
    return network.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_mixes_samples(
    engine: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kw_lightning.nn.engine.autotune._memory", {})
    with torch.inference_mode():
        assert_alone(make_network(engine, dtype), torch.randn(BATCH, 3, 8, 8, dtype=dtype))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["trace", "export"])
def test_no_graph_mixes_samples(form: str) -> None:
    network, x = make_network("auto", torch.float64), torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
    if form == "trace":
        graph = torch.jit.trace(network, x)
    else:
        graph = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    with torch.inference_mode():
        assert_alone(graph, x)
