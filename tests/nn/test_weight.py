"""The `weight` of a dynamic layer: what it serves, what it refuses, what is folded into it, and who never sees it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kw_lightning.nn import KWConv1d, KWConv2d, KWLayer, KWLinear, set_temperature, share_warehouse
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.nn.weight import DynamicWeightError


def layer(kind: type = KWConv2d, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    made = kind(*(arguments or (4, 6, 3)), **options)
    share_warehouse([made], budget=2)
    set_temperature(made, 0.3)
    made.name = "stage.conv"
    return made.eval()


def test_shape_type_and_device_are_those_of_the_static_kernel() -> None:
    weight, static = layer(groups=2).half().weight, nn.Conv2d(4, 6, 3, groups=2).half().weight
    for ask in (
        lambda w: w.shape,
        lambda w: w.size(),
        lambda w: w.size(1),
        lambda w: w.dim(),
        lambda w: w.ndim,
        lambda w: w.numel(),
        lambda w: len(w),
        lambda w: w.dtype,
        lambda w: w.device,
        lambda w: w.requires_grad,
        lambda w: w.is_cuda,
        lambda w: w.is_meta,
        lambda w: w.element_size(),
        lambda w: w.itemsize,
        lambda w: w.is_floating_point(),
        lambda w: w.is_complex(),
        lambda w: w.layout,
        lambda w: w.grad,
        lambda w: w.data.shape,
        lambda w: w.detach().dtype,
    ):
        assert ask(weight) == ask(static)
    assert layer(KWLinear, 8, 4).to("meta").weight.is_meta
    frozen = layer().requires_grad_(False)
    assert not frozen.weight.requires_grad
    assert KWLinear(8, 4).weight.shape == (4, 8)  # before it has a warehouse
    assert PartialLayer([nn.Linear(8, 16), layer(KWLinear, 8, 4)]).weight.shape == (20, 8)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: F.conv2d(torch.randn(1, 4, 5, 5), w),
        lambda w: torch.zeros_like(w),
        lambda w: torch.zeros(6, 4, 3, 3).copy_(w),
        lambda w: nn.init.kaiming_normal_(w),
        lambda w: w.abs(),
        lambda w: w.view(6, -1),
        lambda w: w + 1,
        lambda w: w * 2,
        lambda w: w * torch.randn(1, 4, 1, 1),
        lambda w: torch.randn(6) @ w,
        lambda w: -w,
        lambda w: w[0],
        lambda w: list(w),
    ],
)
def test_what_would_compute_with_it_is_told_so_with_the_layers_name(compute: Callable[[Any], Any]) -> None:
    with pytest.raises(DynamicWeightError) as raised:
        compute(layer().weight)
    message = str(raised.value)
    assert message.startswith('"stage.conv" is dynamic: every sample has a kernel of its own')
    assert message.endswith("Call the layer instead, or keep it static by exclude in the recipe")


def test_a_kernel_cannot_be_set() -> None:
    found = layer()
    with pytest.raises(TypeError, match=r"a dynamic layer takes no weight; load_kernel\(kernel\) starts from one"):
        found.weight = torch.zeros(6, 4, 3, 3)
    with pytest.raises(TypeError, match="takes no weight"):
        found.weight = layer(KWConv2d, 4, 8, 3).weight
    with pytest.raises(KeyError, match="already exists"):
        found.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "norm", "size"), [(KWConv2d, nn.BatchNorm2d, (6, 5)), (KWConv1d, nn.BatchNorm1d, (7,))]
)
def test_a_batch_norm_is_folded_into_a_dynamic_layer(kind: Any, norm: Any, size: Any, bias: bool) -> None:
    convolution, after = layer(kind, bias=bias), norm(6)
    after(torch.randn(8, 6, *size) * 3 + 1)
    nn.init.normal_(after.weight)
    nn.init.normal_(after.bias)
    x = torch.randn(3, 4, *size)
    fused = fuse_conv_bn_eval(convolution, after.eval())
    assert isinstance(fused, kind)
    torch.testing.assert_close(fused(x), after(convolution(x)), rtol=1e-4, atol=1e-5)
    assert convolution.output_scale is None
    again = fuse_conv_bn_eval(fused, after)
    torch.testing.assert_close(again(x), after(after(convolution(x))), rtol=1e-4, atol=1e-5)
    kernels = fused.kernels(fused.attend(x))
    expected = convolution.kernels(convolution.attend(x)) * fused.output_scale.view(-1, *[1] * (kernels.dim() - 2))
    torch.testing.assert_close(kernels, expected)


def test_folded_linear_layers_and_products_from_the_left() -> None:
    linear, factors, x = layer(KWLinear, 4, 6), torch.randn(6, 1), torch.randn(3, 5, 4)
    before = linear(x) - linear.bias
    linear.weight = factors * linear.weight
    torch.testing.assert_close(linear(x) - linear.bias, before * factors.flatten())
    assert torch.equal(linear.state_dict()["output_scale"], factors.flatten())


def test_parameters_state_and_copies_do_not_see_it() -> None:
    found, x = layer(), torch.randn(2, 4, 5, 5)
    assert "weight" not in dict(found.named_parameters(recurse=False))
    assert [name for name in found.state_dict() if name in ("weight", "output_scale")] == []
    assert found.weight.requires_grad
    stored = io.BytesIO()
    torch.save(found, stored)
    stored.seek(0)
    for other in (copy.deepcopy(found), torch.load(stored, weights_only=False)):
        assert torch.equal(other(x), found(x))
        assert other.weight.shape == found.weight.shape


def test_pruning_it_says_what_can_be_masked() -> None:
    made = layer()
    with pytest.raises(
        DynamicWeightError, match=r'^"stage\.conv" is dynamic: .*\(layer\.warehouse, "cells", amount\)$'
    ):
        prune.l1_unstructured(made, "weight", 0.5)
    prune.l1_unstructured(made.warehouse, "cells", 0.5)  # as it says
    for _ in range(2):
        made(torch.randn(2, 4, 5, 5)).sum().backward()
    assert torch.equal(made.warehouse.cells_orig.grad != 0, made.warehouse.cells_mask != 0)


def test_cells_may_be_parametrized() -> None:
    made = layer()
    parametrize.register_parametrization(made.warehouse, "cells", nn.Threshold(0, 0))
    for _ in range(2):
        made(torch.randn(2, 4, 5, 5)).sum().backward()
    original = made.warehouse.parametrizations.cells.original
    assert torch.equal(original.grad != 0, original > 0)


class Encoder(nn.Module):
    """Linear layers of torch's own encoder, dynamic, and a layer that is asked for its weight's type."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.head = KWLinear(16, 4)
        dynamic: list[KWLayer] = [self.head]
        for block in self.encoder.layers:
            block.linear1, block.linear2 = KWLinear(16, 32), KWLinear(32, 16)
            dynamic += [block.linear1, block.linear2]
        share_warehouse(dynamic)
        set_temperature(self, 0.3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x: [batch, tokens, 16]."""
        y = self.encoder(x, src_key_padding_mask=padding)
        return self.head(y.to(self.head.weight.dtype).to(self.head.weight.device))


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_leaves_its_fast_path_in_evaluation(padded: bool) -> None:
    torch.manual_seed(0)
    encoder, x = Encoder().eval(), torch.randn(3, 5, 16)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    expected = encoder(x, padding)  # with gradients torch takes the slow path by itself
    with torch.inference_mode():
        found = encoder(x, padding)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_compiled_network_may_ask_for_it() -> None:
    torch.manual_seed(0)
    encoder, x = Encoder().eval(), torch.randn(3, 5, 16)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), encoder(x), rtol=1e-4, atol=1e-5)
