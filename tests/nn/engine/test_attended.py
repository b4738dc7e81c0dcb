"""A layer as one operator, from its input to what becomes of its output, as torch.compile calls it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kw_lightning.nn.engine import AttentionFactors, Convolution, Epilogue, Norm, attended, bases, reference
from kw_lightning.nn.engine.evaluation import LayerTensors

CELLS, WIDTH, TAU, EPSILON = 4, 3, 0.25, 1e-3
CONVOLUTIONS = {
    "dense": Convolution((12, 10, 3, 3), (6, 5, 1, 1), (2, 1), (1, 1), (1, 1)),
    "depthwise": Convolution((10, 1, 3, 3), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 10),
    "pointwise": Convolution((12, 10, 1, 1), (6, 5, 1, 1), (1, 1), (0, 0), (1, 1)),
    "in one dimension": Convolution((12, 10, 3), (6, 5, 1), (1,), (1,), (1,)),
}


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    attended._calls.clear()
    with torch.inference_mode():
        yield


def make(convolution: Convolution, *, by_sample: bool = False) -> LayerTensors:
    """Return a layer's tensors in float32, with a bias and a norm behind it."""
    generator = torch.Generator().manual_seed(0)
    spatial, out_groups, in_groups = convolution.grid
    mixtures = torch.Size((*spatial, out_groups, in_groups)).numel()
    columns, channels = mixtures * (CELLS + 1), convolution.kernel_shape[0]
    shapes = (CELLS, *convolution.cell_shape), (WIDTH, 10), (4, WIDTH), (columns, WIDTH), (columns,), (4, channels)
    cells, reduce, norm, weight, bias, after = (torch.randn(shape, generator=generator) for shape in shapes)
    mean, variance = (None, None) if by_sample else (norm[2], norm[3].square() + 0.5)
    initial = torch.arange(mixtures) % CELLS
    attention = torch.tensor(TAU), initial, reduce, None, norm[0], norm[1] + 1, mean, variance, weight, bias
    return LayerTensors(cells, *attention, None, after[3], after[0], after[1].square() + 0.5, after[2], None)


def expect(x: Tensor, of: LayerTensors, convolution: Convolution, added: Tensor | None) -> Tensor:
    """Return what the literal form and torch's operators give."""
    raw = F.linear(x.flatten(2).mean(2), of.reduce, of.reduce_bias)
    if of.given is None:
        raw = F.layer_norm(raw, of.scale.shape, of.scale, of.shift, EPSILON)
    else:
        raw = F.batch_norm(raw, *of.given, of.scale, of.shift, eps=EPSILON)
    alpha = AttentionFactors(raw.relu(), of.weight, of.bias, of.tau, of.initial).alpha()
    y = reference.convolve(x, alpha, of.cells, convolution)
    assert of.norm_mean is not None and of.norm_variance is not None  # noqa: PT018
    norm = Norm(of.norm_mean, of.norm_variance, of.norm_weight, of.norm_bias, 1e-5)
    return Epilogue(None, of.output_bias, norm, added, "relu6").apply(y)


@pytest.mark.parametrize(("name", "engine"), [*((name, "auto") for name in CONVOLUTIONS), ("dense", "mix_outputs")])
def test_it_computes_what_the_literal_form_and_operators_afterwards_do(name: str, engine: str) -> None:
    convolution = CONVOLUTIONS[name]
    for batch, by_sample in ((0, False), (1, False), (2, True), (33, False), (1, False)):
        of = make(convolution, by_sample=by_sample)
        x = torch.randn(batch, 10, *[6, 5][: convolution.dimensions]) + 0.5
        if batch == 2 and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        added = torch.randn_like(expect(x, of, convolution, None)) if batch > 1 else None
        y = attended.call(x, of, added, convolution, (EPSILON, 1e-5), engine, "relu6")
        torch.testing.assert_close(y, expect(x, of, convolution, added), rtol=1e-4, atol=1e-4)
        assert y.is_contiguous() == x.is_contiguous()


def test_kept_bases_serve_it_too() -> None:
    convolution = CONVOLUTIONS["dense"]
    of, x = make(convolution), torch.randn(3, 10, 6, 5)
    for _ in range(2):
        with bases("always"):
            y = attended.call(x, of, None, convolution, (EPSILON, 1e-5), "auto", "relu6")
        torch.testing.assert_close(y, expect(x, of, convolution, None), rtol=1e-4, atol=1e-4)
        of.cells.mul_(1.5)


def test_tensors_of_other_shapes_at_the_same_places_are_another_layers() -> None:
    convolution, x = CONVOLUTIONS["dense"], torch.randn(2, 10, 6, 5)
    wide = make(convolution)
    rows = {"reduce": 2 * 10, "scale": 2, "shift": 2, "mean": 2, "variance": 2, "weight": len(wide.weight) * 2}
    flat = {name: getattr(wide, name).reshape(-1)[:count] for name, count in rows.items()}
    narrow = wide._replace(**flat | {"reduce": flat["reduce"].view(2, 10), "weight": flat["weight"].view(-1, 2)})
    for of in (wide, narrow, wide):
        y = attended.call(x, of, None, convolution, (EPSILON, 1e-5), "auto", "relu6")
        torch.testing.assert_close(y, expect(x, of, convolution, None), rtol=1e-4, atol=1e-4)


def test_it_keeps_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attended, "MOST_CALLS", 3)
    convolution = CONVOLUTIONS["pointwise"]
    of = make(convolution)
    for side in range(2, 9):
        attended.call(torch.randn(1, 10, side, side), of, None, convolution, (EPSILON, 1e-5), "auto", None)
    assert 0 < len(attended._calls) <= 3


@pytest.mark.parametrize("by_sample", [False, True])
def test_it_keeps_pytorchs_rules(by_sample: bool) -> None:
    convolution = CONVOLUTIONS["dense"]
    of, x = make(convolution, by_sample=by_sample), torch.randn(2, 10, 6, 5)
    arguments = x, list(of), None, convolution.numbers, [EPSILON, 1e-5], "auto", "relu"
    checks = ("test_schema", "test_faketensor")  # it has no gradient
    results = torch.library.opcheck(torch.ops.kw_lightning.attended_convolution, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
