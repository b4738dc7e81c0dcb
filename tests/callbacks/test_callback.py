"""KWCallback: the layers are dynamic at the right moment, in every use of a Trainer."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, Net, dynamic_net, loader, trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn

import kw_lightning
from kw_lightning.callbacks import KWCallback
from kw_lightning.errors import KWError, RecipeError
from kw_lightning.nn import KWConv2d, KWLayer, Warehouse, warehouses


def dynamic(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, KWLayer)]


EXPECTED = ["net.conv1", "net.conv2", "net.head"]


class InSetup(Classifier):
    """Builds its layers in `setup`."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage: str) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()


class InConfigureModel(Classifier):
    """Builds its layers in `configure_model`, as sharded modules must."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.calls = 0

    def configure_model(self) -> None:
        self.calls += 1
        if isinstance(self.net, nn.Identity):
            self.net = Net()


class Moments(Callback):
    """Notes at which of Lightning's moments the layers were dynamic, and what the optimizer got."""

    def __init__(self) -> None:
        self.dynamic: dict[str, bool] = {}
        self.in_optimizer = 0

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.dynamic["on_fit_start"] = dynamic(pl_module) == EXPECTED
        self.in_optimizer = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)

    def on_sanity_check_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.dynamic["on_sanity_check_start"] = dynamic(pl_module) == EXPECTED


@pytest.mark.parametrize("kind", [Classifier, InSetup, InConfigureModel])
def test_layers_are_dynamic_before_the_optimizer(tmp_path: Path, kind: type[Classifier]) -> None:
    model, moments = kind(), Moments()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE), moments])
    run.fit(model, loader(), loader(samples=8))
    assert dynamic(model) == EXPECTED
    assert moments.dynamic == {"on_fit_start": True, "on_sanity_check_start": True}
    assert moments.in_optimizer == len(list(model.parameters()))
    assert "configure_model" not in vars(model)
    assert {float(w.temperature) for w in warehouses(model).values()} == {0.5}  # 5 of 10 steps


@pytest.mark.parametrize("kind", [Classifier, InSetup, InConfigureModel])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_a_fit(tmp_path: Path, kind: type[Classifier], verb: str) -> None:
    model = kind()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)])
    result = getattr(run, verb)(model, loader(samples=8))
    assert dynamic(model) == EXPECTED
    assert {float(w.temperature) for w in warehouses(model).values()} == {1.0}
    if verb == "predict":
        torch.testing.assert_close(torch.cat(result), model.eval()(loader(samples=8).dataset.tensors[0]))
    else:
        assert result[0]


def test_names_of_a_recipe_are_relative_to_the_submodule(tmp_path: Path) -> None:
    recipe = {"kw": 1, "name": "inner", "warehouses": {"a": {"layers": ["conv?"]}}, "temperature": {"steps": 5}}
    model = Classifier()
    trainer(tmp_path, callbacks=[KWCallback(recipe, module="net")]).fit(model, loader())
    assert dynamic(model) == ["net.conv1", "net.conv2"]
    assert float(warehouses(model)["a"].temperature) == 0.0


def test_a_submodule_that_is_one_layer(tmp_path: Path) -> None:
    recipe = {"kw": 1, "name": "one", "warehouses": {"a": {"layers": ["*"]}}}
    model = Classifier()
    trainer(tmp_path, callbacks=[KWCallback(recipe, module="net.conv1")]).fit(model, loader())
    assert dynamic(model) == ["net.conv1"]
    assert isinstance(model.net.conv1, KWConv2d)


def test_two_callbacks_for_two_submodules(tmp_path: Path) -> None:
    recipe = {"kw": 1, "name": "inner", "warehouses": {"a": {"layers": ["conv?"]}}}
    slow, fast = {**recipe, "temperature": {"steps": 10}}, {**recipe, "temperature": {"steps": 5}}
    model = Classifier()
    model.student = Net()
    model.training_step = lambda batch, batch_idx: (model.net(batch[0]) + model.student(batch[0])).square().mean()
    callbacks = [KWCallback(slow, module="net"), KWCallback(fast, module="student")]
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(model, loader())
    assert [float(warehouses(part)["a"].temperature) for part in (model.net, model.student)] == [0.5, 0.0]
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert len(torch.load(tmp_path / "two.ckpt")["kw_lightning"]) == 2
    callbacks = [KWCallback(slow, module="net"), KWCallback(fast, module="student")]
    trainer(tmp_path, callbacks=callbacks).fit(model, loader())  # alike, and yet neither is the other's copy
    assert [float(warehouses(part)["a"].temperature) for part in (model.net, model.student)] == [0.5, 0.0]


def test_several_fits_in_a_row(tmp_path: Path) -> None:
    model = Classifier()
    callback = KWCallback(RECIPE)
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(model, loader())
    parameters = [id(parameter) for parameter in model.parameters()]
    run.fit_loop.max_epochs = 2
    run.fit(model, loader())  # goes on: the Trainer counts on
    assert callback.temperature.temperature == 0.0
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())  # a new Trainer begins at step 0 again
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert {float(w.temperature) for w in warehouses(model).values()} == {0.5}
    run.test(model, loader(), verbose=False)


def test_a_network_made_dynamic_before(tmp_path: Path) -> None:
    model = Classifier()
    kw_lightning.convert(model, RECIPE)
    cells = model.net.conv1.warehouse.cells
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())
    assert model.net.conv1.warehouse.cells is cells
    other = {"kw": 1, "name": "other", "warehouses": {"x": {"layers": ["net.conv1"]}}}
    with pytest.raises(KWError, match='warehouses convolutions, head; recipe "other" asks for x'):
        trainer(tmp_path, callbacks=[KWCallback(other)]).fit(model, loader())


class Copied(nn.Module):
    """Stands in the place of a warehouse and trains a copy of it, as adapters do of modules that are to be saved."""

    def __init__(self, warehouse: Warehouse) -> None:
        super().__init__()
        self.original, self.trained = warehouse, copy.deepcopy(warehouse)
        self.original.requires_grad_(False)

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self.trained(*inputs)


def test_a_warehouse_with_another_module_in_its_place(tmp_path: Path) -> None:
    model = Classifier()
    kw_lightning.convert(model, RECIPE)
    model.net.conv1.warehouse = copied = Copied(model.net.conv1.warehouse)
    frozen, trained = copied.original.cells.clone(), copied.trained.cells.clone()
    callback = KWCallback({**RECIPE, "log": {"attention": {"every_n_epochs": 1}}})
    trainer(tmp_path, callbacks=[callback]).fit(model, loader(), loader())
    assert torch.equal(copied.original.cells, frozen)
    assert not torch.equal(copied.trained.cells, trained)
    assert float(copied.trained.temperature) == float(copied.original.temperature) == 0.5
    assert callback.attention is not None
    assert list(callback.attention.latest) == ["convolutions", "head"]


def test_warm_start_keeps_the_function(tmp_path: Path) -> None:
    model = Classifier()
    x = loader().dataset.tensors[0]
    expected = model.eval()(x)
    trainer(tmp_path, callbacks=[KWCallback(RECIPE, warm_start=True)]).validate(model, loader(), verbose=False)
    assert dynamic(model) == EXPECTED
    torch.testing.assert_close(model(x), expected)


def test_a_warm_start_under_budget_1_begins_at_temperature_0(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"kw": 1, "warehouses": {"a": {"layers": ["net.conv*"], "budget": "1/2"}}}
    callback = KWCallback(recipe, warm_start=True)
    trainer(tmp_path, callbacks=[callback]).fit(Classifier(), loader())
    assert callback.temperature.temperature == 0
    started = KWCallback({**recipe, "temperature": {"start": 1, "steps": 1000}}, warm_start=True)
    trainer(tmp_path, callbacks=[started]).fit(Classifier(), loader())
    assert started.temperature.temperature > 0.9


def test_sections_of_the_trainer_are_ignored_with_one_warning() -> None:
    sections: dict[str, Any] = {
        "model": {"backbone": "torchvision/resnet18", "pretrained": True},
        "data": {"name": "digits"},
        "train": {"epochs": 3},
    }
    with pytest.warns(UserWarning, match=r'recipe "tiny": ignored the sections model, data, train') as caught:
        callback = KWCallback({**RECIPE, **sections})
    assert len([warning for warning in caught if "ignored" in str(warning.message)]) == 1
    assert callback.recipe.data is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KWCallback(RECIPE)


def test_a_recipe_without_warehouses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^warehouses: a recipe for a network needs warehouses, or stages$"):
        trainer(tmp_path, callbacks=[KWCallback({"kw": 1})]).validate(Classifier(), loader())


def test_problems_of_a_recipe_leave_the_module_static(tmp_path: Path) -> None:
    model = Classifier()
    wrong = {"kw": 1, "name": "wrong", "warehouses": {"a": {"layers": ["net.conv1", "net.convv2"]}}}
    with pytest.raises(RecipeError, match=r"net\.convv2.*net\.conv2"):
        trainer(tmp_path, callbacks=[KWCallback(wrong)]).fit(model, loader())
    assert dynamic(model) == []
    with pytest.raises(
        KWError,
        match=r'^found the unknown submodule "nett", allowed: net of Classifier, and what is inside them; '
        r'did you mean "net"\?$',
    ):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE, module="nett")]).fit(model, loader())
    inner = {"kw": 1, "name": "inner", "warehouses": {"a": {"layers": ["conv?"]}}}
    with pytest.raises(RecipeError, match=r'found the names of layers of "net", .* KWCallback\(…, module="net"\)'):
        trainer(tmp_path, callbacks=[KWCallback(inner)]).fit(model, loader())


class Early(Classifier):
    """Collects its parameters in the constructor, before any callback can act."""

    def __init__(self) -> None:
        super().__init__()
        self.collected = list(self.parameters())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.collected, lr=0.1)


def test_parameters_that_no_optimizer_trains(tmp_path: Path) -> None:
    with pytest.raises(
        KWError, match=r"no optimizer trains net\.conv1\.attention\.reduce\.weight, .* and \d+ more: were they"
    ):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(Early(), loader())
    model = Early()
    kw_lightning.convert(model, RECIPE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("net.stem"))
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())  # frozen on purpose


def test_cells_of_a_layer_that_was_taken_out_and_is_still_held(tmp_path: Path) -> None:
    model = Classifier()
    kw_lightning.convert(model, RECIPE)
    taken, model.net.conv1 = model.net.conv1, nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(KWError, match=r'^warehouse "convolutions" of net\.conv2 is owned by a layer that is not'):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())
    del taken
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())


def test_a_fit_without_an_optimizer(tmp_path: Path) -> None:
    model = Classifier()
    model.configure_optimizers = lambda: None  # as where training_step only looks at the data
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())
    assert dynamic(model) == EXPECTED


@pytest.mark.parametrize(
    "copier", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1), ModelPruning("l1_unstructured")]
)
def test_callbacks_that_copy_come_after(tmp_path: Path, copier: Callback) -> None:
    with pytest.raises(KWError, match=f"{type(copier).__name__} has .* the network before .* list KWCallback first"):
        trainer(tmp_path, callbacks=[copier, KWCallback(RECIPE)]).fit(Classifier(), loader())


def test_a_copy_made_in_setup_is_dynamic(tmp_path: Path) -> None:
    class Prepares(Classifier):
        def setup(self, stage: str) -> None:
            self.ready = True  # has nothing to do with layers, but that cannot be known

    model = Prepares()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, callbacks=[KWCallback(RECIPE), average], max_epochs=3).fit(model, loader())
    assert dynamic(model) == EXPECTED
    assert average.n_averaged is not None
    assert average.n_averaged > 0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_an_error_before_configure_model_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(InConfigureModel):
        def setup(self, stage: str) -> None:
            raise RuntimeError("no disk")

    model = Failing()
    callback = KWCallback(RECIPE)
    with pytest.raises(RuntimeError, match="no disk"):
        trainer(tmp_path, callbacks=[callback]).fit(model, loader())
    assert "configure_model" not in vars(model)
    model.configure_model()
    assert dynamic(model) == []


def test_the_module_can_be_copied_and_pickled_after(tmp_path: Path) -> None:
    model = InConfigureModel()
    trainer(tmp_path, callbacks=[KWCallback(RECIPE)]).fit(model, loader())
    x = loader().dataset.tensors[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.eval()(x), model.eval()(x))
        assert twin.net.conv2.warehouse is twin.net.conv1.warehouse
        assert twin.net.conv1.warehouse is not model.net.conv1.warehouse


def test_the_module_can_be_pickled_while_it_is_trained(tmp_path: Path) -> None:
    class Pickles(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            torch.save(pl_module, tmp_path / "module.pt")

    model = Classifier()
    trainer(tmp_path, callbacks=[KWCallback(RECIPE), Pickles()]).fit(model, loader())
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = loader().dataset.tensors[0]
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_the_state_key_tells_submodules_and_warehouses_apart() -> None:
    assert KWCallback(RECIPE, module="net").state_key == (
        "KWCallback{'module': 'net', 'warehouses': 'convolutions,head'}"
    )


def test_batch_size_finder(tmp_path: Path) -> None:
    class Tunable(Classifier):
        def val_dataloader(self) -> Any:
            return loader(samples=8)

    model = Tunable(batch_size=2)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)], max_epochs=1)
    found = Tuner(run).scale_batch_size(model, max_trials=3, steps_per_trial=2)
    assert found == 8
    assert dynamic(model) == EXPECTED
    run.fit(model)
    assert run.global_step == 5
    assert {float(w.temperature) for w in warehouses(model).values()} == {0.5}


def test_learning_rate_finder(tmp_path: Path) -> None:
    model = Classifier()
    callback = KWCallback({**RECIPE, "temperature": {"steps": 20}})
    run = trainer(tmp_path, callbacks=[callback], max_epochs=4)
    found = Tuner(run).lr_find(model, num_training=20, min_lr=1e-4, max_lr=1.0)
    assert found is not None
    assert len(found.results["lr"]) >= 15
    assert dynamic(model) == EXPECTED
    before = float(warehouses(model)["head"].temperature)
    run.fit(model)
    assert (before, float(warehouses(model)["head"].temperature)) == (1.0, 0.0)


def test_manual_optimization_and_statistics(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    callback = KWCallback({**RECIPE, "log": {"attention": {"every_n_epochs": 1}}})
    model = Manual()
    trainer(tmp_path, callbacks=[callback]).fit(model, loader(), loader(samples=8))
    assert callback.temperature.temperature == 0.5
    assert callback.attention is not None
    assert set(callback.attention.latest) == {"convolutions", "head"}
    assert (tmp_path / "attention" / "epoch=0000-step=5.npz").exists()


def test_dynamic_nets_of_the_tests_are_what_recipes_give() -> None:
    model = Classifier()
    kw_lightning.convert(model, RECIPE)
    assert dynamic(Classifier(dynamic_net())) == dynamic(model)
