"""Exact resume: the data's order, the random numbers, checkpoints that are whole, and a killed run as a whole."""

from __future__ import annotations

import itertools
import os
import random
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_networks import Classifier, dataset, dynamic_net, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DistributedSampler, IterableDataset, TensorDataset
from torchmetrics import SumMetric

from kw_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from kw_lightning.callbacks.exact_checkpoint import ExactCheckpoint
from kw_lightning.callbacks.resume import RandomState, ResumableDataLoader, RunningMetrics
from kw_lightning.callbacks.temperature import TemperatureAnnealing

HERE = Path(__file__).parent


def numbered(**options: Any) -> ResumableDataLoader:
    torch.manual_seed(7)
    return ResumableDataLoader(list(range(22)), **{"batch_size": 4, "shuffle": True, **options})


def batches(loader: ResumableDataLoader, epochs: int = 1) -> list[list[int]]:
    return [torch.as_tensor(batch).tolist() for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"batch_size": None, "shuffle": None}, {"shuffle": False}, {"drop_last": True}]
)
@pytest.mark.parametrize("seen", [0, 2, 5, 6, 8])
def test_the_rest_of_an_epoch(options: dict[str, Any], seen: int) -> None:
    whole = batches(numbered(**options), epochs=3)
    loader = numbered(**options)
    state, count = loader.state_dict(), 0
    while count < seen:
        for _ in loader:
            count += 1
            state = loader.state_dict()
            if count == seen:
                break
    torch.rand(3)
    again = numbered(**options)
    again.load_state_dict(state)
    found = batches(again, epochs=2)
    assert found == whole[seen : seen + len(found)]
    assert len(found) >= len(again)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_a_stream_is_refused_before_its_first_checkpoint() -> None:
    for data, found in ((Stream(), "an object of Stream"), (iter([1]), "an object of list_iterator")):
        with pytest.raises(TypeError, match=f"^found {found} in the place of a data set, allowed: one with a length"):
            ResumableDataLoader(data)  # type: ignore[arg-type]


def test_an_order_per_epoch_and_per_seed() -> None:
    first, second = numbered(), numbered()
    assert batches(first) == batches(second)
    one, two = batches(first), batches(first)
    assert one != two
    assert sorted(itertools.chain(*two)) == list(range(22))
    torch.manual_seed(8)
    assert batches(ResumableDataLoader(list(range(22)), 4, True)) != batches(numbered())


def test_the_global_random_numbers_have_no_part() -> None:
    loader = numbered()
    before = torch.get_rng_state()
    batches(loader, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_distributed_sampler_resumes_its_epoch() -> None:
    def make() -> ResumableDataLoader:
        sampler = DistributedSampler(range(22), num_replicas=2, rank=1, seed=5)
        return numbered(sampler=sampler, shuffle=None)

    loader = make()
    loader.sampler.set_epoch(3)
    whole = batches(loader)
    iterator = iter(loader)
    next(iterator)
    again = make()
    again.load_state_dict(loader.state_dict())
    assert batches(again) == whole[1:]


def test_random_state_of_every_library() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    class Run:
        world_size, global_rank = 1, 0

    state = RandomState().state_dict()
    expected = draw()
    other = RandomState()
    other.load_state_dict(state)
    assert draw() != expected
    other.on_train_start(Run(), None)  # type: ignore[arg-type]
    assert draw() == expected
    other.on_train_start(Run(), None)  # type: ignore[arg-type]
    assert draw() != expected  # once only


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "runs" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, path, storage_options={})


SAVE_FOREVER = """
import sys, torch
from kw_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
step = 0
while True:
    step += 1
    AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((2_000_000,), step)}, sys.argv[1])
    print(step, flush=True)
"""


def test_a_fast_dev_run_leaves_the_runs_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"of a run")
    checkpoint = ExactCheckpoint(path, steps=1)
    run = trainer(tmp_path, callbacks=[checkpoint], fast_dev_run=True, enable_checkpointing=True)
    run.fit(Classifier(dynamic_net()))
    assert path.read_bytes() == b"of a run"
    with pytest.raises(ValueError, match=r'^found the folder \S+, allowed: a file, as "\S+last\.ckpt"$'):
        ExactCheckpoint(tmp_path)


def test_a_kill_during_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(path)], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    written = 0
    while written < 3:
        written = int(process.stdout.readline())
    # Between this line and the kill the process is somewhere in its fourth file or later.
    while not list(tmp_path.glob("*.partial")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = torch.load(path)
    assert found["step"] >= 3
    assert (found["weights"] == found["step"]).all()


def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(HERE / "resume_script.py")

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")

    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # the script sets it; so it is taken back afterwards
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    done = subprocess.run(  # 7 batches an epoch: in the middle of the second of three
        [sys.executable, script, str(killed), "--kill-at", "12"],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (killed / "end.pt").exists()
    run(killed, "--resume")
    assert "resumed at step 10" in capsys.readouterr().out  # checkpoints every 5 steps: 11 and 12 are taken again
    expected, found = torch.load(whole / "end.pt"), torch.load(killed / "end.pt")
    assert found.keys() == expected.keys()
    for part, values in expected.items():
        assert found[part].keys() == values.keys()
        for name, value in values.items():
            same = (
                torch.equal(found[part][name], value) if isinstance(value, torch.Tensor) else found[part][name] == value
            )
            assert same, f"{part}: {name}"
    assert expected["temperatures"]["13"] == pytest.approx(5 / 18)


class Noting(Classifier):
    """Notes which images each step takes, and stops before one of them."""

    def __init__(self, stop: int | None, asks: bool) -> None:
        super().__init__(dynamic_net())
        self.stop, self.asks = stop, asks
        self.images: list[list[int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.stop:
            raise InterruptedError

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.images.append(batch[2].tolist())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks:  # Lightning makes the loader for it before it reads the checkpoint
            assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("options", [{}, {"asks": True}, {"limit_train_batches": 4}, {"num_workers": 1}])
def test_images_come_in_the_order_of_the_whole_run(tmp_path: Path, options: dict[str, Any], stop: int) -> None:
    workers = options.get("num_workers", 0)
    limit = {name: value for name, value in options.items() if name == "limit_train_batches"}
    images = TensorDataset(*dataset().tensors, torch.arange(40))

    def images_of(stop: int | None = None, ckpt_path: Path | None = None) -> list[list[int]]:
        torch.manual_seed(1)
        data = ResumableDataLoader(images, 8, True, num_workers=workers, persistent_workers=workers > 0)
        callbacks = [RandomState(), ExactCheckpoint(tmp_path / "last.ckpt", steps=1)]
        run = trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=True, **limit)
        model = Noting(stop, options.get("asks", False))
        with nullcontext() if stop is None else pytest.raises(InterruptedError):
            run.fit(model, data, ckpt_path=ckpt_path)
        return model.images

    whole = images_of()
    begun = images_of(stop)
    assert begun + images_of(ckpt_path=tmp_path / "last.ckpt") == whole


class OnPlateau(Noting):
    """Halves its learning rate at the end of every epoch, or of every other, and notes it."""

    def __init__(self, stop: int | None, frequency: int) -> None:
        super().__init__(stop, asks=False)
        self.frequency = frequency
        self.rates: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        # a threshold that no loss meets
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return [optimizer], [{"scheduler": schedule, "monitor": "val_loss", "frequency": self.frequency}]


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("length", [{"max_epochs": 5}, {"max_steps": 25, "max_epochs": -1}])
def test_plateaus_are_those_of_the_whole_run(tmp_path: Path, length: dict[str, int], frequency: int) -> None:
    images = TensorDataset(*dataset().tensors, torch.arange(40))

    def rates_of(stop: int | None = None, ckpt_path: Path | None = None) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(1)
        callbacks = [RandomState(), ExactCheckpoint(tmp_path / "last.ckpt", steps=1)]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, **length)
        model = OnPlateau(stop, frequency)
        with nullcontext() if stop is None else pytest.raises(InterruptedError):
            run.fit(model, ResumableDataLoader(images, 8, True), loader(16), ckpt_path=ckpt_path)
        schedule: Any = run.lr_scheduler_configs[0].scheduler
        return model.rates, schedule.state_dict()

    whole, end = rates_of()
    assert whole[::5] == [0.05 / 2 ** (epoch // frequency) for epoch in range(5)]
    for stop in (3, 5, 6, 15, 24):
        begun, _ = rates_of(stop)
        rest, found = rates_of(ckpt_path=tmp_path / "last.ckpt")
        assert begun + rest == whole
        assert found == end


class EpochEnds(Callback):
    """Notes after which step an epoch ended, and whether it had been validated."""

    def __init__(self) -> None:
        self.found: list[tuple[int, bool]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.found.append((trainer.global_step, "val_loss" in trainer.callback_metrics))


@pytest.mark.parametrize("stop", [5, 7, 10])
def test_an_epoch_ends_once_where_a_run_is_counted_in_steps(tmp_path: Path, stop: int) -> None:
    images = TensorDataset(*dataset().tensors, torch.arange(40))
    ends = EpochEnds()
    for until, ckpt_path in ((stop, None), (None, tmp_path / "last.ckpt")):
        callbacks = [RandomState(), ExactCheckpoint(tmp_path / "last.ckpt", steps=1), ends]
        run = trainer(tmp_path, max_steps=15, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True)
        with nullcontext() if until is None else pytest.raises(InterruptedError):
            run.fit(Noting(until, asks=True), ResumableDataLoader(images, 8, True), loader(16), ckpt_path=ckpt_path)
    assert ends.found == [(5, True), (10, True), (15, True)]
    assert run.max_steps == 15


@pytest.mark.parametrize(
    "prepares",
    [
        lambda: GradientAccumulationScheduler({0: 1, 1: 2, 2: 3}),
        lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1),
    ],
)
def test_what_is_set_at_the_start_of_an_epoch(tmp_path: Path, prepares: Callable[[], Callback]) -> None:
    images = TensorDataset(*dataset().tensors, torch.arange(40))

    def weights(stop: int | None = None, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        callbacks = [RandomState(), ExactCheckpoint(tmp_path / "last.ckpt", steps=1), prepares()]
        run = trainer(tmp_path, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        model = Noting(stop, asks=False)
        with nullcontext() if stop is None else pytest.raises(InterruptedError):
            run.fit(model, ResumableDataLoader(images, 8, True), ckpt_path=ckpt_path)
        return model.state_dict()

    whole = weights()
    weights(stop=6)
    rest = weights(ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


def test_a_plateau_before_a_checkpoint_is_not_taken_twice(tmp_path: Path) -> None:
    images = TensorDataset(*dataset().tensors, torch.arange(40))
    rates: list[float] = []
    for epochs, ckpt_path in ((2, None), (4, tmp_path / "saved.ckpt")):
        callbacks = [ExactCheckpoint(tmp_path / "last.ckpt")]
        run = trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        model = OnPlateau(None, 1)
        run.fit(model, ResumableDataLoader(images, 8, True), loader(16), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "saved.ckpt")  # after all of the epoch, and its plateau
        rates += model.rates
    assert rates[::5] == [0.05, 0.025, 0.0125, 0.00625]


def test_a_checkpoint_that_was_tested_is_not_gone_on_with(tmp_path: Path) -> None:
    class Counting(Noting):
        def __init__(self) -> None:
            super().__init__(None, asks=False)
            self.seen = SumMetric()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.seen.update(len(batch[2]))
            self.log("seen", self.seen, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    images = TensorDataset(*dataset().tensors, torch.arange(40))
    model, resuming = Counting(), [RandomState(), RunningMetrics()]
    checkpoint = ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=3)
    annealing = TemperatureAnnealing(steps=5)
    first = trainer(tmp_path, callbacks=[*resuming, annealing, checkpoint], enable_checkpointing=True)
    first.fit(model, ResumableDataLoader(images, 8, True))
    first.test(model, loader(samples=8), ckpt_path=tmp_path / "inside.ckpt", verbose=False)
    model.images = []
    annealing.steps = 4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the temperature's annealing takes")
        second = trainer(tmp_path, callbacks=[*resuming, annealing])
        second.fit(model, ResumableDataLoader(images, 8, True))
    assert sorted(itertools.chain(*model.images)) == list(range(40))
    assert float(second.callback_metrics["seen"]) == 40


def test_lightning_accepts_the_loader(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=2)
    model = Classifier(dynamic_net())
    run.fit(model, ResumableDataLoader(dataset(), batch_size=8, shuffle=True))
    assert run.global_step == 10
