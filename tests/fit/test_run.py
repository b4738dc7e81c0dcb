"""A whole run: what it writes, what its checkpoints hold, and how it goes on."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit import Classifier, Result, evaluate, fit
from kw_lightning.fit.data import data_module
from kw_lightning.fit.evaluation import measure
from kw_lightning.fit.run import make_parts
from kw_lightning.fit.trainer import monitored
from kw_lightning.nn import warehouses


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    from quick_run import QUICK

    return fit("digits-resnet", QUICK, output=tmp_path_factory.mktemp("runs") / "run")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def test_a_run_folder_holds_what_it_was_made_with_and_what_it_reached(finished: Result) -> None:
    files = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    assert {"recipe.lock.yaml", "versions.json", "metrics.csv", "result.json"} <= files
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= files
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in files)
    assert load_recipe(finished.folder / "recipe.lock.yaml").train == finished.module.recipe.train
    assert json.loads((finished.folder / "versions.json").read_text())["torch"] == torch.__version__.split("+")[0]
    result = json.loads((finished.folder / "result.json").read_text())
    assert result["val"] == {"last": finished.last, "best": finished.best}
    assert (result["test"], result["checkpoint"]) == ({"best": finished.test}, "best.ckpt")
    assert json.loads((finished.folder / "model/classes.json").read_text()) == [str(digit) for digit in range(10)]
    assert result["parameters"] == sum(parameter.numel() for parameter in finished.module.network.parameters())


def test_metrics_and_temperature_are_logged(finished: Result) -> None:
    logged = rows(finished.folder)
    accuracies = [float(row["val/accuracy"]) for row in logged if row["val/accuracy"]]
    assert len(accuracies) == 2
    assert accuracies[-1] == pytest.approx(finished.last["accuracy"])
    assert max(accuracies) == pytest.approx(finished.best["accuracy"])
    assert [row["test/accuracy"] for row in logged[:-1]] == [""] * 5  # the test part is opened once, at the end
    assert float(logged[-1]["test/accuracy"]) == finished.test["accuracy"]
    temperatures = [float(row["temperature"]) for row in logged if row["temperature"]]
    assert temperatures == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0])  # 3 of 6 steps: (T − t)/T before step t
    assert {float(warehouse.temperature) for warehouse in warehouses(finished.module.network).values()} == {0.0}


def test_evaluate_gives_the_same_from_the_checkpoint_alone(finished: Result, tmp_path: Path) -> None:
    alone = tmp_path / "copy.ckpt"
    alone.write_bytes((finished.folder / "checkpoints/last.ckpt").read_bytes())
    assert evaluate(alone, split="val").metrics == finished.last
    again = evaluate(finished.folder)
    assert (again.metrics, again.split, again.checkpoint.name) == (finished.test, "test", "best.ckpt")
    assert evaluate(finished.folder, split="val").metrics == finished.best
    written = json.loads((finished.folder / "result.json").read_text())["classes"]
    assert list(again.classes) == written
    assert [entry["name"] for entry in written] == [str(digit) for digit in range(10)]
    images = sum(entry["images"] for entry in written)
    hits = sum(entry["images"] * entry["recall"] for entry in written)
    assert (images, hits / images) == (40, pytest.approx(finished.test["accuracy"]))


def test_lightning_loads_the_checkpoint(finished: Result) -> None:
    module = Classifier.load_from_checkpoint(finished.folder / "checkpoints/last.ckpt", weights_only=True)
    assert measure(module, data_module(module.recipe), "val") == finished.last


def test_a_folder_that_holds_a_run_is_refused(finished: Result, quick: list[str]) -> None:
    before = (finished.folder / "metrics.csv").read_bytes()
    with pytest.raises(RunError, match="is not empty"):
        fit("digits-resnet", quick, output=finished.folder)
    assert (finished.folder / "metrics.csv").read_bytes() == before


def test_default_folder_and_resume_auto(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*quick, "log.tensorboard=false", "train.schedule.name=constant"]
    first = fit("digits-resnet", [*options, "train.epochs=1"], resume="auto")  # nothing to go on from: a new run
    assert first.folder == Path("runs/digits-resnet-1")
    second = fit("digits-resnet", [*options, "train.epochs=2"], resume="auto")
    assert second.folder == first.folder
    assert [int(row["step"]) for row in rows(second.folder) if row["val/accuracy"]] == [2, 5]
    unbroken = fit("digits-resnet", [*options, "train.epochs=2"])
    assert unbroken.folder == Path("runs/digits-resnet-2")
    assert all(torch.equal(value, weights(unbroken.folder)[key]) for key, value in weights(second.folder).items())


def test_resume_of_another_network_is_refused(finished: Result, quick: list[str]) -> None:
    with pytest.raises(RunError, match=r"last\.ckpt is of another network than the recipe's"):
        fit("digits-resnet", [*quick, "defaults.budget=2"], resume=finished.folder)


def test_ctrl_c_leaves_a_checkpoint_that_goes_on_to_the_bit(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [*quick, "log.tensorboard=false", "data.train.noise=0.1"]
    unbroken = fit("digits-resnet", quick, output=tmp_path / "unbroken")
    original = Classifier.training_step

    def interrupted(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, index)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("digits-resnet", quick, output=tmp_path / "broken")
    assert signal.getsignal(signal.SIGINT) is handler  # a notebook goes on after it
    state = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 5  # the batch that was under way is done
    resumed = fit("digits-resnet", quick, resume=tmp_path / "broken")
    assert resumed.folder == tmp_path / "broken"
    assert all(torch.equal(value, weights(unbroken.folder)[key]) for key, value in weights(resumed.folder).items())
    assert (resumed.last, resumed.best, resumed.test) == (unbroken.last, unbroken.best, unbroken.test)
    splits = [json.loads((folder / "split.json").read_text()) for folder in (resumed.folder, unbroken.folder)]
    assert splits[0] == splits[1] == state["kw_lightning_split"]


def test_everything_at_once(tmp_path: Path, quick: list[str]) -> None:
    options = [
        "train.mixup=0.8",
        "train.cutmix=1",
        "train.label_smoothing=0.1",
        "train.gradient_clip=1",
        "train.accumulate=2",
        "train.ema.decay=0.9",
        "train.precision=bf16-mixed",
        "data.train.rand_augment.magnitude=5",
        "data.train.random_erasing=0.25",
        "train.optimizer.name=SGD",
        "train.optimizer.momentum=0.9",
        "log.attention.every_n_epochs=1",
        "train.monitor=val/loss",
    ]
    result = fit("digits-resnet-half", [*quick, *options], output=tmp_path / "run")
    assert evaluate(tmp_path / "run").metrics == result.test
    assert list((tmp_path / "run/attention").glob("*.npz"))
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4  # 3 batches make 2 optimizer steps, twice
    average, current = state["state_dict"], state["current_model_state"]
    different = [key for key in average if key.endswith("cells") and not torch.equal(average[key], current[key])]
    assert different
    assert all(torch.equal(average[key], current[key]) for key in average if key.endswith("temperature"))


def test_average_that_starts_late_is_the_network_before(tmp_path: Path, quick: list[str]) -> None:
    fit("digits-resnet", [*quick, "train.ema={decay: 0.9, start_epoch: 5}"], output=tmp_path / "run")
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    average, current = state["state_dict"], state["current_model_state"]
    assert all(torch.equal(average[key], current[key]) for key in average)


def test_a_static_network_trains_and_is_evaluated_to_the_same_figures(tmp_path: Path, quick: list[str]) -> None:
    result = fit("digits-resnet-static", quick, output=tmp_path / "run")
    assert not warehouses(result.module.network)
    assert evaluate(tmp_path / "run").metrics == result.test


@pytest.mark.parametrize(("given", "mode"), [("true", None), ("reduce-overhead", "reduce-overhead")])
def test_the_network_is_compiled_in_the_mode_asked_for(
    given: str, mode: str | None, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: modes.append((type(module).__name__, mode)))
    result = fit("digits-resnet", [*quick, "train.epochs=1", f"train.compile={given}"], output=tmp_path / "run")
    assert modes == [(type(result.module.network).__name__, mode)]


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_weights_of_the_last_step_may_be_the_best(tmp_path: Path, quick: list[str], steps: int) -> None:
    options = [f"train.max_steps={steps}", "train.epochs=9", "train.monitor=val/loss"]
    result = fit("digits-resnet", [*quick, *options], output=tmp_path / "run")
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows(result.folder) if row["val/loss"]}
    assert list(losses) == [step - 1 for step in range(3, steps, 3)] + [steps - 1]
    assert losses[steps - 1] == pytest.approx(result.last["loss"], abs=1e-6)
    assert min(losses.values()) == pytest.approx(result.best["loss"], abs=1e-6)


def test_no_epochs_still_ends_in_a_checkpoint(tmp_path: Path, quick: list[str]) -> None:
    result = fit("digits-resnet", [*quick, "train.epochs=0"], output=tmp_path / "run")
    assert evaluate(tmp_path / "run").metrics == result.test


def test_every_mistake_of_training_at_once_and_before_a_folder_is_made(tmp_path: Path, quick: list[str]) -> None:
    wrong = ["train.optimizer.name=AdamV", "train.monitor=val/acuracy"]
    with pytest.raises(RecipeError) as caught:
        fit("digits-resnet", [*quick, *wrong], output=tmp_path / "run")
    assert [problem.path for problem in caught.value.problems] == ["train.optimizer.name", "train.monitor"]
    assert caught.value.problems[1].message == (
        'found the unknown metric "val/acuracy", allowed: '
        + ", ".join(monitored(load_recipe("digits-resnet")))
        + '; did you mean "val/accuracy"?'
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=fake", r"the network does not take the images of the data, \[3, 224, 224\]"),
        (
            "data.args.classes=7",
            "the network has 10 outputs and the data has 7 classes: give the last layer of model.layers 7 units",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_data(tmp_path: Path, quick: list[str], override: str, message: str) -> None:
    fake = ["data.name=fake", "data.args.shape=[1, 8, 8]"] if "classes" in override else []
    with pytest.raises(RecipeError, match=message):
        fit("digits-resnet", [*quick, *fake, override], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_for_another_task_is_told_by_its_output(tmp_path: Path) -> None:
    data = {"name": "fake", "args": {"shape": [3, 64, 64], "classes": 3}, "workers": 0}
    model = {"backbone": "torchvision/lraspp_mobilenet_v3_large", "input": [3, 64, 64], "args": {"num_classes": 3}}
    with pytest.raises(RecipeError) as caught:
        fit({"kw": 1, "name": "segments", "model": model, "data": data}, output=tmp_path / "run")
    (problem,) = caught.value.problems
    assert problem.message == ("found an output of type OrderedDict in evaluation, allowed: a tensor [batch, classes]")


class Answers(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> Answers | dict[str, torch.Tensor]:
        logits = x.flatten(1)[:, :10]
        return Answers(logits, logits) if self.training else {"out": logits}


def test_an_output_that_is_no_tensor_is_a_mistake_of_the_recipe() -> None:
    module = Classifier(load_recipe("digits-resnet"))
    module.network = Several()
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(RecipeError, match=r"type Answers in training, allowed: a tensor .*aux_logits to false"):
        module.train()(images)
    with pytest.raises(RecipeError, match=r"type dict in evaluation, allowed: a tensor \[batch, classes\]$"):
        module.eval()(images)


@pytest.mark.parametrize(("activation", "warned"), [("softmax", True), ("log_softmax", False), ("relu", False)])
def test_a_softmax_at_the_networks_end_is_warned_of(
    activation: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    layers = ["Flatten", {"Dense": {"units": 10, "activation": activation}}]
    data = {"name": "digits", "train": {"mean": [0.305], "std": [0.376]}}
    recipe = load_recipe({"kw": 1, "model": {"input": [1, 8, 8], "layers": layers}, "data": data})
    make_parts(recipe, recipe)
    assert ("the network ends in a softmax" in caplog.text) is warned


NORM_OF_ONE_VALUE = """
kw: 1
model:
  input: [1, 8, 8]
  layers: [GlobalAveragePooling2D, BatchNormalization, {Dense: {units: 10}}]
data: {name: digits, validation: none, train: {mean: [0.305], std: [0.376]}}
"""


def test_a_norm_that_a_single_image_gives_one_value_trains_on_any_number_of_images(
    tmp_path: Path, quick: list[str]
) -> None:
    (tmp_path / "net.yaml").write_text(NORM_OF_ONE_VALUE)
    few = [*quick, "data.train.samples=9", "data.batch_size=4"]
    fit(tmp_path / "net.yaml", few, output=tmp_path / "run")
    with pytest.raises(RunError, match=r"a batch of one image trains.*make data.batch_size 2 or more"):
        fit(tmp_path / "net.yaml", [*few, "data.batch_size=1"], output=tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"broken\.ckpt: not a checkpoint, or a damaged one"):
        evaluate(path)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(RunError, match="no recipe inside"):
        evaluate(tmp_path / "other.ckpt")


def test_classifier_in_an_ordinary_trainer(tmp_path: Path, quick: list[str]) -> None:
    recipe = load_recipe("digits-resnet", quick)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Classifier(recipe), data_module(recipe))
    assert trainer.global_step == 3


def test_what_is_said_on_every_run_is_kept_quiet(
    tmp_path: Path, quick: list[str], recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    fit("digits-resnet", quick, output=tmp_path / "run")
    assert [str(warning.message) for warning in recwarn if "kw_lightning" in str(warning.filename)] == []
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "val/accuracy" in lines[-1]


@pytest.mark.parametrize(
    ("backbone", "cure"),
    [
        ("torchvision/shufflenet_v2_x0_5", "model.args.num_classes: .* set model.args.num_classes to 3"),
        ("python:own_networks:network", "model.args: .* give its constructor the 3 classes by model.args"),
    ],
)
def test_other_classes_than_the_data_names_the_key(
    backbone: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_networks.py").write_text("from torchvision.models import shufflenet_v2_x0_5 as network\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(
        {
            "kw": 1,
            "model": {"backbone": backbone},
            "data": {"name": "fake", "args": {"shape": [3, 32, 32], "classes": 3}},
            "train": {"epochs": 1},
        }
    )
    with pytest.raises(RecipeError, match=cure.replace(" .* ", ".*1000 outputs and the data has 3 classes: ")):
        fit(recipe, output=tmp_path / "run", allow_python=["own_networks"])
    assert not (tmp_path / "run").exists()


def test_evaluation_takes_overrides(tmp_path: Path, quick: list[str]) -> None:
    fit("digits-resnet", quick, output=tmp_path / "run")
    whole = evaluate(tmp_path / "run", ["data.eval.samples=null"]).metrics
    assert whole == evaluate(tmp_path / "run", ["data.eval.samples=597"]).metrics
    assert whole != evaluate(tmp_path / "run", ["data.eval.samples=5"]).metrics
    with pytest.raises(RecipeError, match=r'data\.rot: found the unknown key "rot"'):
        evaluate(tmp_path / "run", ["data.rot=/elsewhere"])
    with pytest.raises(RunError, match="do not fit"):
        evaluate(tmp_path / "run", ["warehouses.stage2.budget=2"])
