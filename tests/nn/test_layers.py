"""Layers: they stand in for torch's, agree with one static convolution a sample, and take a static kernel over."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kw_lightning.nn import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.engine import ENGINES, refusal
from kw_lightning.nn.partial import PartialLayer

LAYERS = [
    (KWConv1d, nn.Conv1d, (8, 12, 5), {"stride": 2, "padding": 2, "dilation": 2}, (11,)),
    (KWConv2d, nn.Conv2d, (8, 12, 3), {"padding": 1}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 12, (3, 1)), {"padding": (1, 0), "stride": (2, 1), "bias": False}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 12, (2, 4)), {"padding": "same", "dilation": (1, 2)}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 12, 3), {"padding": "valid", "groups": 2}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 8, 3), {"padding": 1, "groups": 8}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 12, 3), {"padding": 2, "padding_mode": "reflect"}, (7, 6)),
    (KWConv2d, nn.Conv2d, (8, 12, 3), {"padding": (1, 2), "padding_mode": "circular"}, (7, 6)),
    (KWConv3d, nn.Conv3d, (4, 6, (1, 3, 2)), {"padding": (0, 1, 1), "stride": (1, 2, 1)}, (3, 6, 5)),
    (KWLinear, nn.Linear, (8, 12), {}, None),
    (KWLinear, nn.Linear, (8, 12), {"bias": False}, (5,)),
]


def pair(dynamic, static, sizes, options, spatial="split"):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    layer = dynamic(*sizes, **options, dtype=torch.float64)
    share_warehouse([layer], budget=2, spatial=spatial, dtype=torch.float64)
    twin = static(*sizes, **options, dtype=torch.float64)
    return layer.eval(), twin.eval()


def batch(layer, size, count=3):  # type: ignore[no-untyped-def]
    if isinstance(layer, KWLinear):
        return torch.randn(count, *(size or ()), layer.in_features, dtype=torch.float64)
    return torch.randn(count, layer.in_channels, *size, dtype=torch.float64)


@pytest.mark.parametrize(("dynamic", "static", "sizes", "options", "size"), LAYERS)
@pytest.mark.parametrize("spatial", ["split", "whole"])
def test_every_sample_is_convolved_with_its_own_kernel(dynamic, static, sizes, options, size, spatial) -> None:  # type: ignore[no-untyped-def]
    layer, twin = pair(dynamic, static, sizes, options, spatial)
    set_temperature(layer, 0.3)
    x = batch(layer, size)
    kernels = layer.kernels(layer.attend(x))
    with torch.no_grad():
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
        for sample, kernel, found in zip(x, kernels, layer(x), strict=True):
            twin.weight.copy_(kernel)
            torch.testing.assert_close(found, twin(sample.unsqueeze(0)).squeeze(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dynamic", "static", "sizes", "options", "size"), LAYERS)
def test_at_temperature_one_a_static_kernel_gives_the_static_output(dynamic, static, sizes, options, size) -> None:  # type: ignore[no-untyped-def]
    layer, twin = pair(dynamic, static, sizes, options)
    assert layer.load_kernel(twin.weight) == 0
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(twin.bias)
    x = batch(layer, size)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-10, atol=1e-10)


def test_a_kernel_under_a_small_budget_says_how_much_is_lost() -> None:
    layer = KWConv2d(8, 8, 2)
    share_warehouse([layer], budget=0.5)
    kernel = torch.zeros(8, 8, 2, 2)
    kernel[..., 0, 1] = 3.0  # the second of four mixtures, which starts as the zero cell
    kernel[..., 1, 1] = 4.0
    assert layer.load_kernel(kernel) == pytest.approx(3 / 5)


@pytest.mark.parametrize(("dynamic", "static", "sizes", "options", "size"), LAYERS)
def test_a_batch_is_its_samples_one_by_one(dynamic, static, sizes, options, size) -> None:  # type: ignore[no-untyped-def]
    layer, _ = pair(dynamic, static, sizes, options)
    set_temperature(layer, 0.0)
    x = batch(layer, size)
    singles = torch.cat([layer(sample.unsqueeze(0)) for sample in x])
    torch.testing.assert_close(layer(x), singles, rtol=1e-10, atol=1e-10)
    if not isinstance(layer, KWLinear):
        torch.testing.assert_close(layer(x[0]), singles[0], rtol=1e-10, atol=1e-10)


def test_a_linear_layer_takes_one_vector_and_many_tokens() -> None:
    layer, _ = pair(KWLinear, nn.Linear, (8, 12), {})
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert layer(x).shape == (2, 3, 4, 12)
    torch.testing.assert_close(layer(x)[1], layer(x[1:].flatten(1, 2))[0].unflatten(0, (3, 4)))
    assert layer(x[0, 0, 0]).shape == (12,)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_head_takes_a_class_token_where_it_lies_among_others(norm) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    head = KWLinear(32, 5)
    share_warehouse([head], norm=norm)
    set_temperature(head.eval(), 0.3)
    tokens = torch.randn(4, 17, 32)
    for rows in (tokens[:, 0], tokens[:1, 3].expand(4, 32)):
        with torch.no_grad():
            torch.testing.assert_close(head(rows), head(rows.clone()))
        torch.testing.assert_close(head(rows), head(rows.clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_stays_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = KWConv2d(8, 12, 3, padding=1)
    share_warehouse([layer])
    set_temperature(layer, 0.5)
    x = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer.eval()(x), rtol=1, atol=1)


def test_a_layer_without_a_warehouse_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="share_warehouse"):
        KWConv2d(8, 8, 3)(torch.randn(1, 8, 5, 5))


def test_a_layer_has_one_warehouse_only() -> None:
    layer = KWConv2d(8, 8, 3)
    share_warehouse([layer], name="first")
    with pytest.raises(ValueError, match='"first" already'):
        share_warehouse([layer])
    with pytest.raises(ValueError, match="twice"):
        share_warehouse([twice := KWConv2d(8, 8, 3), twice])
    with pytest.raises(TypeError, match="an object of Conv2d in the place of a layer, allowed: dynamic layers"):
        share_warehouse([KWConv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("norm", "BatchNorm", 'the unknown norm "BatchNorm", allowed: batch, layer; did you mean "batch"?'),
        ("spatial", "whol", 'the unknown spatial "whol", allowed: split, whole; did you mean "whole"?'),
        ("start", "onw", 'the unknown start "onw", allowed: own, shared, none; did you mean "own"?'),
        ("function", "softmx", 'the unknown function "softmx", allowed: contrast, softmax, sigmoid, relu; did'),
    ],
)
def test_an_unknown_word_is_refused(option: str, value: str, message: str) -> None:
    layer = KWConv2d(8, 8, 3)
    with pytest.raises(ValueError, match=re.escape(message)):
        share_warehouse([layer], **{option: value})  # type: ignore[arg-type]
    assert share_warehouse([layer]) is layer.warehouse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KWConv2d(8, 8, 3, groups=3), "groups=3"),
        (lambda: KWConv2d(8, 8, 3, padding="same", stride=2), "stride 1"),
        (lambda: KWConv2d(8, 8, 3, padding="full"), '"full"'),
        (lambda: KWConv2d(8, 8, (3, 3, 3)), "kernel_size needs 2 numbers"),
    ],
)
def test_wrong_arguments_are_refused(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_an_input_of_other_channels_is_refused() -> None:
    layer = KWConv2d(8, 8, 3)
    share_warehouse([layer])
    with pytest.raises(RuntimeError, match=r"\[batch, 8, size, size\]: found \[2, 4, 5, 5\]"):
        layer(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "twin"), [(KWConv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), (KWLinear(8, 8), nn.Linear(8, 8))]
)
def test_an_input_of_another_type_is_refused_where_torch_refuses_it(layer, twin, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    if layer.warehouse is None:
        share_warehouse([layer])
    x = torch.ones(2, 8, 8, 8).to(dtype)
    with pytest.raises(RuntimeError):
        twin(x)
    with pytest.raises(RuntimeError, match=rf"input type \({dtype}\) and weight type \(torch.float32\) should be the"):
        layer(x)
    if not dtype.is_floating_point:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"input type \\({dtype}"):
            layer(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_of_every_type_take_their_own(dtype: torch.dtype) -> None:
    for layer in (KWConv2d(8, 8, 3), KWLinear(8, 8)):
        share_warehouse([layer])
        y = layer.to(dtype)(torch.randn(2, 8, 8, 8).to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("kind", "shape"), [(KWConv2d, (2, 8, 5, 5)), (KWLinear, (2, 3, 8))])
@pytest.mark.parametrize(
    ("part", "what"), [("warehouse", "the cells of its warehouse"), ("attention", "its attention")]
)
def test_a_layer_on_two_devices_is_refused(trains, kind, shape, part, what) -> None:  # type: ignore[no-untyped-def]
    layer = kind(8, 8, 3) if kind is KWConv2d else kind(8, 8)
    share_warehouse([layer])
    layer.train(trains)
    x = torch.randn(shape)
    with torch.set_grad_enabled(trains):
        layer(x)
        # As to a GPU, whose addresses a CPU would read, too.
        (layer.warehouse if part == "warehouse" else layer.attention.expand).to("meta")
        with pytest.raises(RuntimeError, match=f"on one device: found the input on cpu and {what} on meta$"):
            layer(x)


@pytest.mark.parametrize(
    ("dynamic", "static", "options", "size"),
    [
        (KWConv1d, nn.Conv1d, {}, (2,)),
        (KWConv2d, nn.Conv2d, {"padding": 1, "dilation": 2}, (2, 7)),
        (KWConv2d, nn.Conv2d, {"padding": 0}, (0, 5)),
        (KWConv3d, nn.Conv3d, {"padding": (0, 1, 1)}, (2, 1, 1)),
    ],
)
def test_a_kernel_larger_than_the_input_is_refused_in_torchs_words(dynamic, static, options, size) -> None:  # type: ignore[no-untyped-def]
    layer, twin = dynamic(4, 4, 3, **options), static(4, 4, 3, **options)
    share_warehouse([layer])
    x = torch.ones(2, 4, *size)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size") as wanted:
        twin(x)
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(wanted.value)


def _gradients_are_zero(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> bool:
    y.sum().backward()
    parameters = list(layer.parameters())
    assert [p.grad is not None for p in parameters] == [True] * len(parameters)
    return x.grad.shape == x.shape and all(not p.grad.any() for p in parameters)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dynamic", "static", "sizes", "options", "size"), LAYERS)
def test_an_empty_batch_gives_torchs_shape_and_zero_gradients(  # type: ignore[no-untyped-def]
    dynamic, static, sizes, options, size, engine
) -> None:
    for norm in ("batch", "layer"):
        for dtype in (torch.float32, torch.float64):
            layer = dynamic(*sizes, **options, dtype=dtype)
            share_warehouse([layer], norm=norm, dtype=dtype)
            set_temperature(layer, 0.5)
            if options.get("groups", 1) > 1 and engine in ("mix_outputs", "mix_inputs"):
                continue
            layer.engine = engine
            x = batch(layer, size, 0).to(dtype).requires_grad_()
            y = layer(x)
            assert (y.shape, y.dtype) == (static(*sizes, **options, dtype=dtype)(x).shape, dtype)
            assert _gradients_are_zero(layer, x, y)
            buffers = dict(layer.attention.named_buffers())
            assert not buffers.get("norm.running_mean", torch.zeros(1)).any()  # no samples, no statistics
            assert layer.eval()(x.detach()).shape == y.shape


def test_samples_without_tokens_and_partial_layers_without_samples() -> None:
    layer = KWLinear(8, 12)
    share_warehouse([layer])
    set_temperature(layer, 0.5)
    x = torch.randn(2, 0, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, 12)
    assert _gradients_are_zero(layer, x, y)
    for dynamic, static, x in (
        (KWLinear(8, 4), nn.Linear(8, 12), torch.randn(0, 8)),
        (KWLinear(8, 4), nn.Linear(8, 12), torch.randn(0, 5, 8)),
        (KWConv2d(8, 4, 3), nn.Conv2d(8, 12, 3), torch.randn(0, 8, 5, 5)),
    ):
        share_warehouse([dynamic])
        both = PartialLayer([static, dynamic])
        y = both(x.requires_grad_())
        assert y.shape[1 if x.dim() == 4 else -1] == 16
        assert _gradients_are_zero(both, x, y)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_of_one_channel_to_one_is_as_any_other(engine: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = KWConv2d(1, 1, 3, padding=1, dtype=dtype)
    share_warehouse([layer], budget=2, dtype=dtype)
    set_temperature(layer.eval(), 0.3)
    x = torch.randn(3, 1, 6, 5, dtype=dtype)
    results = []
    for layer.engine in (engine, "reference"):
        layer.zero_grad()
        y = layer(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)


@pytest.mark.parametrize("engine", ["mix_outputs", "mix_inputs"])
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_engine_that_cannot_compute_a_layer_is_refused_at_its_first_call(
    engine: str, groups: int, device: str
) -> None:
    layer = KWConv2d(8, 8, 3, groups=groups, device=device)
    share_warehouse([layer], device=device)
    assert refusal(engine, layer._convolution()) is not None
    layer.engine = engine
    found = (
        rf'^found engine "{engine}" for .* \[8, {8 // groups}, 3, 3\] in {groups} groups with cells .*know no groups'
    )
    for batch_size in (0, 2):
        with pytest.raises(ValueError, match=found + r"\), allowed: auto, autotune, mix_kernels, reference$"):
            layer(torch.ones(batch_size, 8, 5, 5, device=device))
    with pytest.raises(ValueError, match=found):
        torch.func.vmap(layer.eval())(torch.ones(2, 1, 8, 5, 5, device=device))
    layer.engine = "mix_kernels"
    assert layer(torch.ones(2, 8, 5, 5, device=device)).shape == (2, 8, 3, 3)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(KWConv2d(8, 8, 3), KWConv2d(8, 8, 3))
    share_warehouse(list(layers), budget=0.5, basis=1 / 16)
    set_temperature(layers, 0.5)
    layers(torch.randn(3, 8, 8, 8)).square().sum().backward()
    assert [name for name, p in layers.named_parameters() if p.grad is None] == []


def test_bias_starts_as_torch_draws_it() -> None:
    torch.manual_seed(0)
    found, wanted = KWConv2d(64, 4096, 3).bias.detach(), nn.Conv2d(64, 4096, 3).bias.detach()
    assert float(found.abs().max()) == pytest.approx(float(wanted.abs().max()), rel=0.01)
    assert float(found.std()) == pytest.approx(float(wanted.std()), rel=0.05)


def test_the_padded_static_convolution_agrees_with_torch() -> None:
    layer, _ = pair(KWConv2d, nn.Conv2d, (8, 12, (2, 4)), {"padding": "same", "bias": False})
    x = batch(layer, (5, 5), 1)
    kernel = layer.kernels(layer.attend(x))[0]
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, padding="same"))
