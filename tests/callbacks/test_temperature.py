"""TemperatureAnnealing: the schedule as a pure function, and what a Trainer makes of it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, Net, dynamic_net, loader, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.nn.functional import one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from kw_lightning.callbacks import AttentionStatistics, KWCallback
from kw_lightning.callbacks.temperature import TemperatureAnnealing, temperature_at
from kw_lightning.errors import KWError
from kw_lightning.nn import KWLayer, warehouses


class Recorder(Callback):
    """Notes the temperature that each training batch is computed with, and those of the validation passes."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.validation: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.training.append(self._temperature(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validation.append(self._temperature(pl_module))

    @staticmethod
    def _temperature(pl_module: Any) -> float:
        values = {float(warehouse.temperature) for warehouse in warehouses(pl_module).values()}
        assert len(values) == 1
        return values.pop()


def recorded(tmp_path: Path, annealing: TemperatureAnnealing, **options: Any) -> list[float]:
    recorder = Recorder()
    options["callbacks"] = [annealing, recorder, *options.pop("callbacks", [])]
    trainer(tmp_path, **options).fit(Classifier(dynamic_net()), loader())
    return recorder.training


def linear(steps: int, total: int) -> list[float]:
    return [max(0.0, (total - t) / total) for t in range(1, steps + 1)]


@pytest.mark.parametrize("total", [1, 3, 20, 25020])
def test_linear_is_the_published_schedule(total: int) -> None:
    found = [temperature_at(t, total) for t in range(1, total + 3)]
    assert found == linear(total + 2, total)
    assert found[total - 1 :] == [0.0, 0.0, 0.0]


def test_cosine_starts_and_ends_flat() -> None:
    found = [temperature_at(t, 100, shape="cosine") for t in range(1, 101)]
    assert found[0] == pytest.approx((1 + math.cos(math.pi / 100)) / 2)
    assert found[49] == pytest.approx(0.5)
    assert found[99] == 0.0
    assert all(earlier > later for earlier, later in itertools.pairwise(found))


def test_start_end_and_constant() -> None:
    assert temperature_at(5, 10, start=0.8, end=0.2) == pytest.approx(0.5)
    assert temperature_at(11, 10, start=0.8, end=0.2) == 0.2
    assert {temperature_at(t, 10, start=0.3, shape="constant") for t in (1, 10, 99)} == {0.3}
    assert temperature_at(1, 0) == 0.0
    with pytest.raises(ValueError, match=r'^found the unknown shape "lin", allowed: .*; did you mean "linear"'):
        temperature_at(1, 10, shape="lin")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.5}, "^found start 1.5, allowed: a temperature between 0 and 1$"),
        ({"end": -0.1}, "^found end -0.1, allowed: a temperature between 0 and 1$"),
        ({"epochs": 1, "steps": 5}, "^found epochs=1 and steps=5, allowed: one of them$"),
        ({"steps": -1}, "^found steps -1, allowed: a number of at least 0$"),
        ({"epochs": math.inf}, "^found epochs Infinity, allowed: a number of at least 0$"),
        (
            {"shape": "sine"},
            '^found the unknown shape "sine", allowed: linear, cosine, constant; did you mean "cosine"\\?$',
        ),
    ],
)
def test_arguments_that_make_no_annealing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureAnnealing(**arguments)


def test_each_optimizer_step_has_its_temperature(tmp_path: Path) -> None:
    found = recorded(tmp_path, TemperatureAnnealing(steps=8), max_epochs=2)
    assert found == pytest.approx(linear(10, 8), abs=1e-7)


def test_epochs_may_be_fractions(tmp_path: Path) -> None:
    found = recorded(tmp_path, TemperatureAnnealing(epochs=1.2), max_epochs=2)  # 1.2 × 5 batches
    assert found == pytest.approx(linear(10, 6), abs=1e-7)


def test_accumulated_batches_share_a_temperature(tmp_path: Path) -> None:
    annealing = TemperatureAnnealing(epochs=1)
    found = recorded(tmp_path, annealing, max_epochs=1, accumulate_grad_batches=2)
    assert annealing.total_steps == 3  # 5 batches in twos
    assert found == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-7)


def test_accumulation_that_changes_between_epochs(tmp_path: Path) -> None:
    annealing = TemperatureAnnealing(epochs=2)
    scheduler = GradientAccumulationScheduler({0: 5, 1: 1})
    found = recorded(tmp_path, annealing, max_epochs=2, callbacks=[scheduler])
    assert annealing.total_steps == 1 + 5
    assert found == pytest.approx(linear(6, 6), abs=1e-7)


def test_a_tenth_of_the_run_by_default(tmp_path: Path) -> None:
    by_epochs, by_steps = TemperatureAnnealing(), TemperatureAnnealing()
    recorded(tmp_path, by_epochs, max_epochs=4)
    recorded(tmp_path, by_steps, max_epochs=4, max_steps=10)
    assert (by_epochs.total_steps, by_steps.total_steps) == (2, 1)


def test_a_run_that_ends_before_the_annealing_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="run ends after 4 optimizer steps, before .* over 10: .* τ = 0.6, not 0"):
        found = recorded(tmp_path, TemperatureAnnealing(epochs=2), max_steps=4)
    assert found == pytest.approx(linear(4, 10), abs=1e-7)


def test_a_fast_dev_run_is_not_told_to_be_short(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the run ends after")
        assert recorded(tmp_path, TemperatureAnnealing(epochs=2), fast_dev_run=True) == [0.5]


def test_a_module_that_takes_the_iterator(tmp_path: Path) -> None:
    class Takes(Classifier):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:
            batch, _, _ = next(dataloader_iter)
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    run = trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=4)])
    run.fit(Takes(dynamic_net()), loader())
    assert float(run.callback_metrics["temperature"]) == 0.0


class Endless(IterableDataset[list[torch.Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield [torch.zeros(1, 8, 8), torch.tensor(0)]


def test_data_without_length_needs_steps(tmp_path: Path) -> None:
    data = DataLoader(Endless(), batch_size=2)
    options: dict[str, Any] = {"max_steps": 3, "max_epochs": -1}
    with pytest.raises(KWError, match="needs a length in steps"):
        trainer(tmp_path, callbacks=[TemperatureAnnealing(epochs=2)], **options).fit(Classifier(dynamic_net()), data)
    recorder = Recorder()
    callbacks = [TemperatureAnnealing(steps=2), recorder]
    trainer(tmp_path, callbacks=callbacks, **options).fit(Classifier(dynamic_net()), data)
    assert recorder.training == [0.5, 0.0, 0.0]


def test_a_static_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KWError, match=r"no warehouse in the network.*KWCallback"):
        trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=2)]).fit(Classifier(Net()), loader())


@pytest.mark.parametrize("make", [TemperatureAnnealing, AttentionStatistics])
def test_an_unknown_submodule_is_told(tmp_path: Path, make: Callable[..., Callback]) -> None:
    message = r'^found the unknown submodule "nett", allowed: net of Classifier, .*; did you mean "net"\?$'
    with pytest.raises(KWError, match=message):
        trainer(tmp_path, callbacks=[make(module="nett")]).fit(Classifier(dynamic_net()), loader(), loader(samples=8))


def test_the_sanity_check_does_not_move_it(tmp_path: Path) -> None:
    recorder = Recorder()
    annealing = TemperatureAnnealing(start=0.5, steps=5)
    trainer(tmp_path, callbacks=[annealing, recorder], num_sanity_val_steps=2).fit(
        Classifier(dynamic_net()), loader(), loader(samples=8)
    )
    assert recorder.validation[:1] == [1.0]  # as the network was made
    assert recorder.training == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-7)
    assert recorder.validation[-1] == 0.0


def test_a_resumed_run_goes_on_at_the_exact_value(tmp_path: Path) -> None:
    def fit(**options: Any) -> Recorder:
        recorder = Recorder()
        run = trainer(
            tmp_path,
            max_epochs=2,
            callbacks=[TemperatureAnnealing(steps=9), recorder, *options.pop("callbacks", [])],
            enable_checkpointing=True,
        )
        run.fit(Classifier(dynamic_net()), loader(), **options)
        return recorder

    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(callbacks=[checkpoint]).training
    rest = fit(ckpt_path=tmp_path / "step=3.ckpt").training
    assert whole == pytest.approx(linear(10, 9), abs=1e-7)
    assert rest == whole[3:]
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if key.startswith("TemperatureAnnealing"))
    assert state == {"temperature": pytest.approx(6 / 9), "total_steps": 9}


def test_a_changed_length_is_told_on_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=9)], max_steps=3)
    with pytest.warns(UserWarning, match="run ends"):
        first.fit(Classifier(dynamic_net()), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=5)], max_epochs=2)
    with pytest.warns(UserWarning, match="takes 5 optimizer steps now and took 9 in the checkpoint"):
        second.fit(Classifier(dynamic_net()), loader(), ckpt_path=tmp_path / "a.ckpt")


class Adversaries(Classifier):
    """Two optimizers by hand: one steps `often` times a batch, the other every `seldom` batches."""

    def __init__(self, often: int = 1, seldom: int = 1) -> None:
        super().__init__(dynamic_net())
        self.automatic_optimization = False
        self.often, self.seldom = often, seldom
        self.critic = torch.nn.Linear(4, 1)
        self.temperatures: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        generator, critic = self.optimizers()
        for _ in range(self.often):
            loss = self.critic(self.net(batch[0]).detach()).mean()
            critic.zero_grad()
            self.manual_backward(loss)
            critic.step()
        if batch_idx % self.seldom == 0:
            generator.zero_grad()
            self.manual_backward(self.critic(self.net(batch[0])).mean())
            generator.step()
        self.temperatures.append(Recorder._temperature(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1e-3), torch.optim.SGD(self.critic.parameters(), lr=1e-3)


@pytest.mark.parametrize(("often", "seldom"), [(1, 1), (3, 2), (1, 4)])
def test_several_optimizers_make_one_step_a_batch(tmp_path: Path, often: int, seldom: int) -> None:
    by_epochs, by_steps = Adversaries(often, seldom), Adversaries(often, seldom)
    data = loader(samples=32)
    trainer(tmp_path, callbacks=[TemperatureAnnealing(epochs=1)]).fit(by_epochs, data)
    trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=4)]).fit(by_steps, data)
    assert by_epochs.temperatures == by_steps.temperatures == [0.75, 0.5, 0.25, 0.0]


def test_a_run_of_two_optimizers_resumes_at_the_exact_value(tmp_path: Path) -> None:
    def fit(**options: Any) -> list[float]:
        model = Adversaries(often=2, seldom=3)
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
        run = trainer(
            tmp_path, max_epochs=2, callbacks=[TemperatureAnnealing(epochs=1.6), checkpoint], enable_checkpointing=True
        )
        run.fit(model, loader(), **options)
        return model.temperatures

    whole = fit()
    assert whole == pytest.approx(linear(10, 8), abs=1e-7)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("step=")[2]))
    assert len(saved) == 10
    for batches in (2, 5, 7):  # in the first epoch, at its end, in the second
        assert fit(ckpt_path=saved[batches - 1]) == whole[batches:]


def test_the_default_length_of_a_run_of_two_optimizers_is_a_tenth_of_its_batches(tmp_path: Path) -> None:
    annealing = TemperatureAnnealing()
    trainer(tmp_path, callbacks=[annealing], max_steps=40, max_epochs=-1).fit(Adversaries(), loader())
    assert annealing.total_steps == 2


@pytest.mark.parametrize("make_average", [lambda: EMAWeightAveraging(decay=0.9), WeightAveraging])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_copies_do_not_lag(tmp_path: Path, make_average: Callable[[], WeightAveraging], first: bool) -> None:
    recorder = Recorder()
    model = Classifier(dynamic_net())
    average = make_average()
    callbacks = [TemperatureAnnealing(steps=8), average] if first else [average, TemperatureAnnealing(steps=8)]
    run = trainer(tmp_path, max_epochs=2, callbacks=[*callbacks, recorder], num_sanity_val_steps=0)
    run.fit(model, loader(), loader(samples=8))
    assert recorder.validation == pytest.approx([3 / 8, 0.0], abs=1e-6)  # as in the epoch's last step
    assert Recorder._temperature(model) == 0.0
    assert recorder.training == pytest.approx(linear(10, 8), abs=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_leave_the_start_of_the_attention(tmp_path: Path, decay: float) -> None:
    model = Classifier(dynamic_net())
    callbacks = [TemperatureAnnealing(steps=8), EMAWeightAveraging(decay=decay)]
    trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(model, loader())
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    for network in (model, averaged):
        layers = [module for module in network.modules() if isinstance(module, KWLayer)]
        assert len(layers) == 3
        for layer in layers:
            share = layer.partition
            expected = one_hot(torch.tensor(share.initial_cells), share.cells + 1)[:, :-1]
            assert torch.equal(layer.attention.start, expected.float())


def test_stochastic_weight_averaging_keeps_the_temperature(tmp_path: Path) -> None:
    model = Classifier(dynamic_net(norm="batch"))
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, max_epochs=4, callbacks=[TemperatureAnnealing(steps=8), swa]).fit(model, loader())
    assert Recorder._temperature(model) == 0.0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_submodule_of_its_own(tmp_path: Path) -> None:
    model = Classifier(dynamic_net())
    model.teacher = dynamic_net().requires_grad_(False)  # its warehouses have the same names
    trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=4, module="net")]).fit(model, loader())
    assert Recorder._temperature(model.net) == 0.0
    assert Recorder._temperature(model.teacher) == 1.0


@pytest.mark.parametrize("own", [0.07, 0.8])  # the second is the annealing's own value in the first step
def test_a_module_with_a_temperature_of_its_own_keeps_the_name(tmp_path: Path, own: float) -> None:
    class Contrastive(Classifier):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.log("temperature", own)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=5)], max_epochs=2)
    with pytest.warns(UserWarning, match=r'"temperature" of its own \(.*; this is logged as "attention_temperature"'):
        run.fit(Contrastive(dynamic_net()), loader())
    assert float(run.logged_metrics["temperature"]) == pytest.approx(own)
    assert float(run.logged_metrics["attention_temperature"]) == 0.0


def test_nothing_is_logged_without_loggers_and_bars(tmp_path: Path) -> None:
    callback = KWCallback({**RECIPE, "log": {"attention": {"every_n_epochs": 1}}})
    model = Classifier()
    for step in ("training_step", "validation_step"):
        setattr(model, step, lambda batch, batch_idx: model(batch[0]).square().mean())
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*barebones")
        Trainer(barebones=True, callbacks=[callback], **defaults).fit(model, loader(), loader(samples=8))
    assert callback.temperature.temperature == 0.5
    assert callback.attention is not None
    assert set(callback.attention.latest) == {"convolutions", "head"}


def test_it_is_logged_each_step(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, callbacks=[TemperatureAnnealing(steps=4)], logger=logger, log_every_n_steps=1)
    run.fit(Classifier(dynamic_net()), loader())
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("temperature")
    assert [float(row.split(",")[column]) for row in rows if row.split(",")[column]] == pytest.approx(linear(5, 4))
