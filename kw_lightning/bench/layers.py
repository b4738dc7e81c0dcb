"""The dynamic layers of a network one by one: static layer, literal form and chosen path."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw_lightning.bench.networks import Setting
from kw_lightning.bench.timing import Work, interleaved, kept_bytes, median_ratio
from kw_lightning.nn import KWLayer, KWLinear
from kw_lightning.nn.engine import Convolution, orders, planner
from kw_lightning.nn.engine.problem import Problem


@dataclass(frozen=True)
class LayerResult:
    """One layer, or several that are alike, in training: a forward and a backward pass, the attention included.

    Attributes:
        names: of the layers with these shapes.
        kernel: [out_channels, in_channels / groups, *kernel_size].
        size: spatial size of the input, or its tokens.
        paths: of the engine in the forward and in the backward pass.
        seconds: median of the static layer, of the literal form if measured, and of the layer.
        ratio: of the layer's time to the static one's, median of the rounds.
        kept: bytes kept for the backward pass by the static layer and by this one.
        multiply_adds: of a forward pass over the batch by kernels mixed and then convolved, without the attention.
    """

    names: tuple[str, ...]
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    paths: tuple[str, str]
    seconds: dict[str, float]
    ratio: float
    kept: dict[str, int]
    multiply_adds: dict[str, int]

    @property
    def gflops(self) -> float:
        """Return the floating-point operations per second of the layer, three passes counted."""
        return 6 * self.multiply_adds["kw"] / self.seconds["kw"] / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self) | {"gflops": self.gflops}


def bench_layers(model: nn.Module, setting: Setting) -> list[LayerResult]:
    """Measure every dynamic layer of a network at the sizes that an input gives it; equal ones once."""
    model = setting.place(model).train()
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, x[0].detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, KWLayer)
    ]
    try:
        with torch.no_grad(), setting.autocast():
            model(setting.make_input())
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, KWLayer)
        assert layer.partition is not None
        key = layer._convolution(), type(layer), tuple(x.shape), layer.partition.cells
        groups.setdefault(key, []).append(name)
    results = []
    for names in groups.values():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, KWLayer)
        results.append(_bench_layer(tuple(names), layer, inputs[names[0]], setting))
    return results


def _bench_layer(names: tuple[str, ...], layer: KWLayer, x: Tensor, setting: Setting) -> LayerResult:
    assert layer.partition is not None
    weight = torch.randn(layer.kernel_shape, device=x.device, dtype=x.dtype).requires_grad_()
    x = x.requires_grad_()
    convolution = layer._convolution()

    def static() -> Tensor:
        if isinstance(layer, KWLinear):
            return F.linear(x, weight)
        function = (F.conv1d, F.conv2d, F.conv3d)[convolution.dimensions - 1]
        geometry = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        y: Tensor = function(x, weight, None, *geometry)
        return y

    def dynamic(engine: str) -> Work:
        def forward() -> Tensor:
            layer.engine, before = engine, layer.engine
            try:
                y: Tensor = layer(x)
            finally:
                layer.engine = before
            return y

        return forward

    forwards: dict[str, Work] = {"static": static, "reference": dynamic("reference"), "kw": dynamic(layer.engine)}
    forwards = {kind: forwards[kind] for kind in setting.kinds}
    times = interleaved(
        {kind: _step(forward, setting) for kind, forward in forwards.items()}, setting.device, setting.repeats
    )
    parameters = [weight, *layer.parameters(), *([] if layer.warehouse is None else [layer.warehouse.cells])]
    with setting.autocast():
        kept = {kind: kept_bytes(forwards[kind], parameters) for kind in ("static", "kw")}
    inputs, outputs = math.prod(_size(layer, x)), _positions(layer, convolution, x)
    counted = orders.count("mix_kernels", convolution, layer.partition.cells, inputs, outputs)
    return LayerResult(
        names,
        layer.kernel_shape,
        _size(layer, x),
        _paths(layer, convolution, x, setting),
        {kind: statistics.median(seconds) for kind, seconds in times.items()},
        median_ratio(times, "kw", "static"),
        kept,
        {"static": x.shape[0] * counted.products, "kw": x.shape[0] * sum(counted)},
    )


def _step(forward: Work, setting: Setting) -> Work:
    def step() -> None:
        with setting.autocast():
            y = forward()
        assert isinstance(y, Tensor)
        y.backward(torch.ones_like(y))

    return step


def _size(layer: KWLayer, x: Tensor) -> tuple[int, ...]:
    return (x[0, ..., 0].numel(),) if isinstance(layer, KWLinear) else tuple(x.shape[2:])


def _positions(layer: KWLayer, convolution: Convolution, x: Tensor) -> int:
    size = _size(layer, x)
    return size[0] if isinstance(layer, KWLinear) else torch.Size(convolution.output_size(size)).numel()


def _paths(layer: KWLayer, convolution: Convolution, x: Tensor, setting: Setting) -> tuple[str, str]:
    assert layer.partition is not None
    if layer.engine == "reference":
        return "reference", "reference"
    if isinstance(layer, KWLinear):
        convolution = convolution.over_tokens()
    shapes = x.shape[0], _size(layer, x), layer.partition.cells
    problem = Problem(convolution, *shapes, setting.dtype, x.device, width=layer.factors_width(x.shape[0]))
    forward, backward = (
        planner.rank(problem._replace(backward=backward), layer.engine)[0].name for backward in (False, True)
    )
    return forward, backward
