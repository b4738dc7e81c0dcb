"""The warehouse: owned once, temperature as state, start values."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kw_lightning.nn import KWConv2d, KWLinear, set_temperature, share_warehouse, warehouses
from kw_lightning.nn.finishing import epilogues


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [KWConv2d(8, 8, 3, padding=1, dtype=dtype), KWConv2d(8, 16, 3, padding=1, dtype=dtype)]
    share_warehouse(layers, name="stage", budget=2, dtype=dtype)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def test_cells_are_owned_once() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith("cells")]
    assert names == ["0.warehouse.cells"]
    assert [key for key in model.state_dict() if "warehouse" in key] == [
        "0.warehouse.cells",
        "0.warehouse.temperature",
    ]
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m)])
def test_a_copy_shares_its_own_warehouse(clone) -> None:  # type: ignore[no-untyped-def]
    model = network()
    set_temperature(model, 0.25)
    model(torch.randn(2, 8, 5, 5)).sum().backward()
    twin = clone(model)
    layers = [module for module in twin.modules() if isinstance(module, KWConv2d)]
    assert layers[0].warehouse is layers[1].warehouse
    assert layers[0].warehouse is not model[0].warehouse
    assert float(layers[1].warehouse.temperature) == 0.25
    with torch.no_grad():
        layers[1].warehouse.cells.zero_()
    assert twin(torch.ones(1, 8, 5, 5)).shape == (1, 16, 5, 5)
    assert model[0].warehouse.cells.any()


@pytest.mark.parametrize("clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_next_layer_has_the_cells_of_one_that_another_module_replaces(clone) -> None:  # type: ignore[no-untyped-def]
    model = clone(network())
    cells = model[2].warehouse.cells
    model[0] = nn.Conv2d(8, 8, 3)
    assert [name for name, p in model.named_parameters() if p is cells] == ["2.warehouse.cells"]
    assert "2.warehouse.cells" in model.state_dict()
    assert list(warehouses(model)) == ["stage"]
    before = cells.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 8, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(cells, before)
    set_temperature(model, 0.5)
    assert float(copy.deepcopy(model)[2].warehouse.temperature) == 0.5


def test_cells_stay_with_a_layer_that_is_wrapped_or_copied() -> None:
    model = network()
    model[0] = nn.Sequential(model[0])
    copy.copy(model[0][0])
    copy.deepcopy(model)
    assert [name for name, _ in model.named_parameters() if name.endswith("cells")] == ["0.0.warehouse.cells"]


def test_a_part_of_a_network_has_the_cells_when_the_rest_is_gone() -> None:
    gc.disable()
    try:
        model = network()
        part = nn.Sequential(model[2])
        cells = weakref.ref(model[0].warehouse.cells)
        del model
        assert [name for name, _ in part.named_parameters() if name.endswith("cells")] == ["0.warehouse.cells"]
        del part
        assert cells() is None
    finally:
        gc.enable()


def test_copies_are_made_within_transforms_and_of_parametrized_cells() -> None:
    model, x = network().eval(), torch.randn(2, 8, 5, 5)

    def summed(parameters: dict[str, torch.Tensor], clone: bool) -> torch.Tensor:
        with torch.no_grad():
            twin = copy.deepcopy(model) if clone else model
        return torch.func.functional_call(twin, parameters, (x,)).sum()

    parameters = dict(model.named_parameters())
    found = torch.func.grad(summed)(parameters, True)
    for name, gradient in torch.func.grad(summed)(parameters, False).items():
        torch.testing.assert_close(found[name], gradient)
    copied = torch.func.vmap(lambda sample: copy.deepcopy(model)(sample[None])[0])(x)
    torch.testing.assert_close(copied, model(x))
    parametrize.register_parametrization(model[0].warehouse, "cells", nn.Tanh())
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def mixed() -> nn.Sequential:
    """Return a network of which all kinds of layers compute with cells in their own way."""
    torch.manual_seed(0)
    convolutions = [KWConv2d(8, 8, 3, padding=1), KWConv2d(8, 8, 1)]
    linear = [KWLinear(8, 8), KWLinear(8, 8)]
    share_warehouse(convolutions, name="maps", budget=2)
    share_warehouse(linear[:1], name="tokens", norm="layer")
    share_warehouse(linear[1:], name="learnt", dynamic=False)
    model = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), convolutions[1], nn.Flatten(2), *linear)
    set_temperature(model, 0.3)
    return model.eval()


def output(model: nn.Module, how: str, x: Tensor) -> Tensor:
    if how == "gradients":
        return model(x).detach()
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    with torch.inference_mode(), epilogues(model) if how == "epilogues" else contextlib.nullcontext():
        return model(x)


HOW = ["gradients", "inference", "epilogues", "compiled"]


@pytest.mark.parametrize("how", HOW)
def test_hooks_may_load_the_cells_for_a_layer_and_free_them_after_it(how: str) -> None:
    model, x = mixed(), torch.randn(2, 8, 4, 2)
    expected = output(model, "inference", x)
    calls = []

    def load(warehouse: nn.Module, _: object) -> None:
        warehouse.cells.data = stored[warehouse]
        calls.append(warehouse.name)

    def free(warehouse: nn.Module, *_: object) -> None:
        warehouse.cells.data = torch.full_like(warehouse.cells, torch.nan)

    stored = {warehouse: warehouse.cells.data.clone() for warehouse in warehouses(model).values()}
    for warehouse in stored:
        free(warehouse)
        warehouse.register_forward_pre_hook(load)
        warehouse.register_forward_hook(free)
    torch.testing.assert_close(output(model, how, x), expected)
    assert calls[-4:] == ["maps", "maps", "tokens", "learnt"]


@pytest.mark.parametrize("how", HOW)
def test_cells_may_be_pruned(how: str) -> None:
    model, x = mixed(), torch.randn(2, 8, 4, 2)
    parameters = [(warehouse, "cells") for warehouse in warehouses(model).values()]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for warehouse, _ in parameters:
        assert torch.equal(warehouse.cells_orig.grad != 0, warehouse.cells_mask != 0)
    pruned = output(model, how, x)
    for warehouse, name in parameters:
        prune.remove(warehouse, name)
        assert (warehouse.cells == 0).any()
    torch.testing.assert_close(output(model, "inference", x), pruned)


class Adapter(nn.Module):
    """Stands in the place of a warehouse, and adds to its cells while it is called, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, nn.Parameter(torch.randn(base.cells.shape))

    def forward(self, *inputs: object) -> Tensor:
        cells = self.base.cells
        parametrize.register_parametrization(self.base, "cells", Plus(self.added))
        try:
            return self.base(*inputs)
        finally:
            parametrize.remove_parametrizations(self.base, "cells", leave_parametrized=False)
            assert self.base.cells is cells


class Plus(nn.Module):
    def __init__(self, added: Tensor) -> None:
        super().__init__()
        self.added = [added]

    def forward(self, cells: Tensor) -> Tensor:
        return cells + self.added[0]


class Chosen(nn.Module):
    """Stands in the place of a warehouse, and calls a copy of it, as what saves modules beside adapters does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.other = base, copy.deepcopy(base)
        with torch.no_grad():
            self.other.cells.add_(1)

    def forward(self, *inputs: object) -> Tensor:
        return self.other(*inputs)


@pytest.mark.parametrize("how", HOW[:3])
@pytest.mark.parametrize("kind", [Adapter, Chosen])
@pytest.mark.parametrize("clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_all_layers_compute_by_a_module_in_the_place_of_the_warehouse(kind, clone, how: str) -> None:  # type: ignore[no-untyped-def]
    model, plain, x = mixed(), mixed(), torch.randn(2, 8, 4, 2)
    for layer in (model[0], model[5], model[6]):
        layer.warehouse = kind(layer.warehouse)
    with torch.no_grad():
        for warehouse, adapted in zip(warehouses(plain).values(), (model[0], model[5], model[6]), strict=True):
            warehouse.cells.add_(adapted.warehouse.added if kind is Adapter else 1)
    expected = output(plain, "inference", x)
    model = clone(model)
    torch.testing.assert_close(output(model, how, x), expected)
    model(x).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if name.endswith(("added", "other.cells")) and p.grad.any()]
    assert len(trained) == 3
    assert model[3].weight.shape == (8, 8, 1, 1)


def test_temperature_travels_with_the_state_dict() -> None:
    model, other = network(), network()
    set_temperature(model, 0.125)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert float(warehouses(other)["stage"].temperature) == 0.125


def averaged_by_torch(model: nn.Module, *, swa: bool, use_buffers: bool) -> tuple[nn.Module, Callable[[], object]]:
    averaging = {} if swa else {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    average = AveragedModel(model, use_buffers=use_buffers, **averaging)
    return average, lambda: average.update_parameters(model)


def averaged_by_state_dict(model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    """As ultralytics' ModelEMA does it."""
    average = copy.deepcopy(model).eval().requires_grad_(False)

    def update() -> None:
        state = model.state_dict()
        for key, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value *= 0.9
                value += (1 - 0.9) * state[key].detach()

    return average, update


def averaged_by_assignment(model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    """As momentum encoders do it: parameters only, and new tensors in the place of the old."""
    average = copy.deepcopy(model)

    def update() -> None:
        for own, other in zip(average.parameters(), model.parameters(), strict=True):
            own.data = own.data * 0.9 + other.data * (1 - 0.9)

    return average, update


@pytest.mark.parametrize(
    "make",
    [
        lambda model: averaged_by_torch(model, swa=True, use_buffers=True),
        lambda model: averaged_by_torch(model, swa=False, use_buffers=True),
        lambda model: averaged_by_torch(model, swa=True, use_buffers=False),
        averaged_by_state_dict,
        averaged_by_assignment,
    ],
    ids=["swa", "ema", "parameters", "state_dict", "assignment"],
)
@pytest.mark.parametrize("end", [0.0, 0.25])
def test_averages_of_the_weights_have_the_temperature_of_the_network(
    make: Callable[[nn.Module], tuple[nn.Module, Callable[[], object]]], end: float
) -> None:
    model = network()
    average, update = make(model)
    temperatures = [1.0, 0.75, 0.5, end, end, end]
    for temperature in temperatures:
        set_temperature(model, temperature)
        with torch.no_grad():
            model[0].warehouse.cells.add_(0.1)
        update()
    (found,) = warehouses(average).values()
    assert float(found.temperature) == pytest.approx(end, abs=1e-7)
    assert not torch.equal(found.cells, model[0].warehouse.cells)  # an average
    reloaded = network()
    state = average.module.state_dict() if isinstance(average, AveragedModel) else average.state_dict()
    reloaded.load_state_dict(state)
    assert float(reloaded[0].warehouse.temperature) == pytest.approx(end, abs=1e-7)


def test_a_copy_that_is_no_average_keeps_its_temperature() -> None:
    model = network()
    set_temperature(model, 0.5)
    snapshot, own, trained = (copy.deepcopy(model) for _ in range(3))
    pickled = pickle.loads(pickle.dumps(model))
    snapshot.to(torch.float64).to(torch.float32)  # moved, not changed
    set_temperature(own, 0.75)
    trained(torch.randn(2, 8, 5, 5)).sum().backward()
    with torch.no_grad():
        for twin in (own, trained, pickled):
            twin[0].warehouse.cells.mul_(0.5)
    set_temperature(model, 0.0)
    found = [float(twin[0].warehouse.temperature) for twin in (snapshot, own, trained, pickled)]
    assert found == [0.5, 0.75, 0.5, 0.5]


def test_a_copy_may_be_made_in_inference_mode() -> None:
    model = network()
    with torch.inference_mode():
        twin = copy.deepcopy(model)
    set_temperature(model, 0.5)
    assert float(twin[0].warehouse.temperature) == 1.0


def test_a_network_does_not_hold_its_copies() -> None:
    model = network()
    alive = weakref.ref(copy.deepcopy(model)[0].warehouse)
    gc.collect()
    assert alive() is None
    assert "_copies" not in pickle.loads(pickle.dumps(model[0].warehouse)).__getstate__()


def test_networks_side_by_side_may_have_warehouses_of_one_name() -> None:
    both = nn.ModuleList([network(), network()])
    set_temperature(both, 0.5)
    assert [float(part[0].warehouse.temperature) for part in both] == [0.5, 0.5]
    with pytest.raises(ValueError, match='two warehouses are called "stage"'):
        warehouses(both)


def test_temperature_keeps_its_digits_in_half_precision() -> None:
    model = network()
    set_temperature(model, 1 / 3)
    model.to(torch.bfloat16)
    assert model[0].warehouse.temperature.dtype == torch.float32
    assert float(model[0].warehouse.temperature) == pytest.approx(1 / 3, abs=1e-7)
    assert network(torch.float64)[0].warehouse.temperature.dtype == torch.float64


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_temperature_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        set_temperature(network(), value)


def test_cells_of_a_layer_start_with_its_own_deviation() -> None:
    torch.manual_seed(0)
    layers = [KWConv2d(64, 64, 3), KWConv2d(64, 128, 3)]
    warehouse = share_warehouse(layers)
    first, second = layers[0].partition, layers[1].partition
    cells = warehouse.cells.detach()
    assert cells[: first.own_cells].std() == pytest.approx(math.sqrt(2 / (first.own_cells * 64)), rel=0.02)
    assert cells[second.first_cell :].std() == pytest.approx(math.sqrt(2 / (second.own_cells * 64)), rel=0.02)


def test_a_change_of_temperature_does_not_compile_anew() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = network()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 8, 5, 5)
    outputs = []
    for step in range(20):
        set_temperature(model, 1 - step / 20)
        outputs.append(compiled(x).detach())
    assert counter.frame_count == 1
    assert not torch.allclose(outputs[0], outputs[-1])


def test_safetensors_take_the_state(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = network()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    loaded = load_file(tmp_path / "net.safetensors")
    assert torch.equal(loaded["0.warehouse.cells"], model[0].warehouse.cells)


def test_a_network_made_on_the_meta_device_is_complete_after_reset_parameters() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(KWConv2d(8, 8, 3), KWConv2d(8, 8, 3))
        share_warehouse(list(layers), budget=0.5)
    layers.to_empty(device="cpu")
    for module in layers.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    share = layers[1].partition
    expected = nn.functional.one_hot(torch.tensor(share.initial_cells), share.cells + 1)[:, :-1]
    assert torch.equal(layers[1].attention.start, expected.float())
    assert float(layers[1].warehouse.temperature) == 1.0
    assert layers(torch.randn(2, 8, 7, 7)).isfinite().all()
