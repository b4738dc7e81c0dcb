"""The builder: what conversion keeps, what it refuses, and the warm start."""

from __future__ import annotations

import copy
import io
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "planning"))
from networks import TinyResNet, recipe

from kw_lightning import builder
from kw_lightning.builder import apply_plan, build, convert, report
from kw_lightning.errors import KWError, RecipeError
from kw_lightning.nn import KWConv2d, KWLayer, KWLinear, set_temperature, warehouses
from kw_lightning.nn.partial import PartialLayer
from kw_lightning.planning import plan

BLOCKS = {"first": ["layer1.*", "layer2.0.conv1"], "second": ["layer2.0.conv2", "layer2.0.shortcut", "layer2.1.*"]}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state."""
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "found"),
    [("resnet18", "an object of str"), (None, "an object of NoneType"), (TinyResNet, "the class Tiny")],
)
def test_what_is_no_network_is_refused(model: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"^found {found}.* in the place of the network, allowed: a torch.nn.Module$"):
        convert(model, recipe(BLOCKS))
    if model is not None:
        with pytest.raises(TypeError, match=found):
            plan(recipe(BLOCKS), model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_network_that_is_torchscript_is_refused_with_what_to_convert_instead() -> None:
    scripted = torch.jit.trace(TinyResNet(), torch.randn(1, 1, 8, 8))
    with pytest.raises(
        TypeError, match=r"found a TorchScript module.*allowed: the torch\.nn\.Module that it was made of"
    ):
        convert(scripted, recipe(BLOCKS))


def test_convert_changes_the_network_in_place() -> None:
    model = TinyResNet()
    assert convert(model, recipe(BLOCKS)) is model
    assert sorted(warehouses(model)) == ["first", "second"]
    assert sum(isinstance(module, KWConv2d) for module in model.modules()) == 9
    assert isinstance(model.stem, nn.Conv2d)
    set_temperature(model, 0.5)
    model(torch.randn(3, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_convert_a_copy() -> None:
    model = TinyResNet()
    before = state(model)
    converted = convert(model, recipe(BLOCKS), inplace=False)
    assert converted is not model
    assert warehouses(model) == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_convert_takes_a_mapping_and_a_name() -> None:
    model = convert(TinyResNet(), {"kw": 1, "name": "x", "warehouses": {"a": {"layers": ["fc"]}}})
    assert isinstance(model.fc, KWLinear)
    with pytest.raises(RecipeError, match="warehouses: a recipe for a network needs warehouses, or stages"):
        convert(TinyResNet(), recipe())
    with pytest.raises(RecipeError, match="resnet18"):
        convert(TinyResNet(), "resnet18-kw-1y")


def test_plan_and_build_take_a_mapping_and_a_name() -> None:
    named = plan("digits-resnet")
    assert named.parameters.kw == sum(parameter.numel() for parameter in build("digits-resnet").parameters())
    assert plan({"kw": 1, "extends": "digits-resnet"}).parameters == named.parameters
    with pytest.raises(RecipeError, match=r'the unknown recipe "digit-resnet", .*did you mean "digits-resnet"\?'):
        build("digit-resnet")


def test_converting_twice_is_refused() -> None:
    model = convert(TinyResNet(), recipe(BLOCKS))
    with pytest.raises(KWError, match=r'the network is dynamic already: "layer1\.0\.conv1" and 8 other layers'):
        convert(model, recipe(["fc"]))


def test_a_plan_for_another_network_is_refused() -> None:
    planned = plan(recipe(["fc"]), TinyResNet())
    with pytest.raises(KWError, match=r'the plan is for another network: "fc" is another Linear, not \[10, 16\]'):
        apply_plan(planned, TinyResNet(classes=11))
    with pytest.raises(KWError, match='"fc" is no such layer'):
        apply_plan(planned, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(KWError, match='"fc" is dynamic already'):
        apply_plan(planned, convert(TinyResNet(), recipe(["fc"])))


def test_what_is_kept() -> None:
    model = TinyResNet().to(torch.float64).eval()
    model.layer1.train()
    model.layer1[0].requires_grad_(False)
    model.fc.weight.requires_grad_(False)
    seen: list[str] = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append("hook"))
    model.fc.register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True)
    bias = model.fc.bias
    convert(model, recipe({**BLOCKS, "head": ["fc"]}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.layer1[0].conv1.training
    assert model.layer1[0].conv1.attention.norm.training
    assert not model.layer2[0].conv1.attention.norm.training
    assert model.fc.bias is bias
    model(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    handle.remove()  # a handle from before still works
    model(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert seen == ["pre", "hook", "pre"]
    # Frozen layers: their attention; the cells too where all layers of the warehouse are frozen.
    assert not any(p.requires_grad for p in model.layer1[0].conv1.attention.parameters())
    assert all(p.requires_grad for p in model.layer1[1].conv1.attention.parameters())
    assert warehouses(model)["first"].cells.requires_grad
    assert not warehouses(model)["head"].cells.requires_grad
    assert model.fc.bias.requires_grad


def test_geometry_of_convolutions_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), groups=2),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
        nn.Conv2d(8, 8, 3, groups=8),
    )
    x = torch.randn(2, 4, 16, 16)
    y = model(x)
    convert(model, recipe({"a": ["0"], "b": ["1"], "c": ["2"]}), warm_start=True)
    assert torch.allclose(model(x), y, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Conv1d(4, 8, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 9, 9)),
        (nn.Conv3d(4, 8, 3), torch.randn(2, 4, 5, 5, 5)),
        (nn.Linear(4, 8), torch.randn(2, 3, 4)),
    ],
)
def test_a_network_that_is_one_layer(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    converted = convert(model, recipe(["*"]), warm_start=True)
    assert isinstance(converted, KWLayer)
    assert torch.allclose(converted(x), y, atol=1e-6)


def test_sequential_root_and_shared_modules() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    convert(model, recipe(["2", "3"]))
    assert model[0] is model[2]
    assert isinstance(model[0], KWLinear)
    assert len(warehouses(model)) == 1
    model(torch.randn(2, 4)).sum().backward()


def test_network_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TinyResNet()
    convert(model, recipe(BLOCKS))
    assert all(value.is_meta for value in model.state_dict().values())
    with pytest.raises(KWError, match="a warm start needs weights"), torch.device("meta"):
        convert(TinyResNet(), recipe(BLOCKS), warm_start=True)


def test_layers_of_one_warehouse_in_several_places() -> None:
    model = TinyResNet()
    model.layer1[1].double()
    modules = list(model.modules())
    with pytest.raises(KWError, match=r'"first" need one device and one type: found .*conv1" in torch.float32 on cpu'):
        convert(model, recipe(BLOCKS))
    assert list(model.modules()) == modules


def test_failure_leaves_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyResNet()
    before, modules = state(model), list(model.modules())
    with pytest.raises(RecipeError):
        convert(model, recipe({**BLOCKS, "third": ["layer1.0.conv1"]}))

    made: list[int] = []
    real = builder.attach_warehouse

    def fails_at_the_second(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 2:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(builder, "attach_warehouse", fails_at_the_second)
    with pytest.raises(MemoryError):
        convert(model, recipe(BLOCKS))
    assert len(made) == 2
    assert list(model.modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_failure_while_putting_layers_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(TinyResNet):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "fc" and isinstance(value, KWLayer):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = Stubborn()
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="no"):
        convert(model, recipe({**BLOCKS, "head": ["fc"]}))
    assert list(model.modules()) == modules


@pytest.mark.parametrize("budget", [1, "3/2", 4])
def test_warm_start_keeps_the_output(budget: Any) -> None:
    torch.manual_seed(0)
    model = TinyResNet().double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    y = model(x)
    asked = recipe({**BLOCKS, "head": ["fc"]}, defaults={"budget": budget})
    conversion = apply_plan(plan(asked, model), model, warm_start=True)
    assert set(conversion.errors.values()) == {0.0}
    assert torch.allclose(model(x), y, rtol=1e-12, atol=1e-12)
    set_temperature(model, 0)
    assert not torch.allclose(model(x), y)


@pytest.mark.parametrize(("start", "least", "most"), [(None, 0, 0.6), (1, 0.6, 0.8), (0, 0, 0.6)])
def test_warm_start_under_budget_1_says_what_is_lost(
    caplog: pytest.LogCaptureFixture, start: float | None, least: float, most: float
) -> None:
    torch.manual_seed(0)
    model = TinyResNet().eval()
    old = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("conv2")}
    asked = recipe(
        {"a": {"layers": ["*.conv2"], "budget": "1/2"}}, temperature={"start": start} if start in (0, 1) else {}
    )
    with caplog.at_level(logging.WARNING):
        planned = plan(asked, model)
        conversion = report(planned, apply_plan(planned, model, warm_start=True))
    temperature = 1 if start == 1 else 0
    assert conversion.temperature == temperature
    told = f"the 4 layers of warehouse 'a', with budget 0.5, come near their old kernels at temperature {temperature}:"
    assert told in caplog.text
    assert ("temperature.start: 0 comes nearer" in caplog.text) == (start == 1)
    layers = {name: model.get_submodule(name) for name in old}
    kernels = {
        n: found.kernels(found.attend(torch.zeros(1, found.in_channels, 4, 4)))[0] for n, found in layers.items()
    }
    lost = math.hypot(*(float((kernels[name] - old[name]).norm()) for name in old))
    size = math.hypot(*(float(kernel.norm()) for kernel in old.values()))
    assert conversion.errors["a"] == pytest.approx(lost / size, rel=1e-5)
    assert least < conversion.errors["a"] < most  # at τ = 1 half of the mixtures begin as the zero cell: sqrt(1/2)


def test_warm_start_at_temperature_0_keeps_the_output_of_any_budget_over_1() -> None:
    torch.manual_seed(0)
    model = TinyResNet().double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    y = model(x)
    asked = recipe({**BLOCKS, "head": ["fc"]}, defaults={"budget": 2}, temperature={"start": 0})
    assert apply_plan(plan(asked, model), model, warm_start=True).temperature == 0
    assert torch.allclose(model(x), y, rtol=1e-12, atol=1e-12)


def test_part_of_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 12, bias=False))
    x = torch.randn(2, 3, 6)
    y = model(x)
    convert(model, recipe({"a": ["0[1/3:2/3]", "1[2/3:]"], "b": ["0[2/3:]"]}), warm_start=True)
    assert isinstance(model[0], PartialLayer)
    assert [type(part) for part in model[0].parts] == [nn.Linear, KWLinear, KWLinear]
    assert [type(part) for part in model[1].parts] == [nn.Linear, KWLinear]
    assert torch.allclose(model(x), y, atol=1e-6)
    assert (model[0].in_features, model[0].out_features) == (6, 12)
    set_temperature(model, 0.5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6)])
def test_part_of_a_convolution(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1))
    x = torch.randn(shape)
    y = model(x)
    convert(model, recipe(["0[:1/2]"]), warm_start=True)
    assert torch.allclose(model(x), y, atol=1e-6)


def test_build_and_save() -> None:
    asked = recipe({"stage": ["layer4.1.*"]}, model={"backbone": "torchvision/resnet18", "args": {"num_classes": 3}})
    model = build(asked)
    assert sum(p.numel() for p in model.parameters()) == plan(asked).parameters.kw
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = build(asked)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))
