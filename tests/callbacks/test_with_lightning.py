"""What Lightning gives a module, with a dynamic network in it: precision, averages, compilation, summaries, the CLI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_networks import RECIPE, Classifier, Net, dataset, loader, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelPruning,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_summary import summarize
from torch import nn
from torch.fx import GraphModule

import kw_lightning
from kw_lightning.callbacks import KWCallback
from kw_lightning.nn import KWLayer, warehouses

PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"]


class Losses(Classifier):
    """Keeps its losses, and its network's types."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []
        self.types: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.types.add(y.dtype)
        return y

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Weights in float16 need an eps that float16 knows: 1e-8 is 0 there, and 0 / 0 the first step of a parameter
        # without a gradient.
        half = any(parameter.dtype == torch.float16 for parameter in self.parameters())
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4 if half else 1e-8)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.filterwarnings("ignore:You passed `Trainer")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_in_every_precision(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    model = Losses(lr=0.02)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)], precision=precision, max_epochs=6)
    run.fit(model, loader(), loader(samples=8))
    # Weights in bfloat16 lose the small steps of the optimizer, so they learn slower.
    assert sum(model.losses[-5:]) < (0.95 if precision == "bf16-true" else 0.8) * sum(model.losses[:5])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    # On a CPU Lightning runs 16-mixed as bf16-mixed.
    expected = {"32-true": torch.float32, "64-true": torch.float64}.get(precision, torch.bfloat16)
    assert model.types == {expected}
    stored = torch.bfloat16 if precision == "bf16-true" else expected if "true" in precision else torch.float32
    assert model.net.conv1.warehouse.cells.dtype == stored
    assert float(warehouses(model)["head"].temperature) == 0.0


def test_bf16_true_keeps_the_digits_of_the_temperature(tmp_path: Path) -> None:
    model = Classifier()
    callback = KWCallback({**RECIPE, "temperature": {"steps": 100_000}})
    trainer(tmp_path, callbacks=[callback], precision="bf16-true").fit(model, loader())
    assert float(warehouses(model)["head"].temperature) == pytest.approx(1 - 5e-5, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_precision_on_a_gpu(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    model = Losses(lr=0.01)
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)], precision=precision, max_epochs=12, accelerator="gpu")
    run.fit(model, loader())
    assert sum(model.losses[-5:]) < 0.7 * sum(model.losses[:5])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_averages_accumulation_clipping_and_early_stopping_together(tmp_path: Path) -> None:
    model = Losses()
    stop = EarlyStopping("train_loss", patience=1, min_delta=10.0)
    callbacks = [KWCallback(RECIPE), EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.01, 0.9), stop]
    run = trainer(
        tmp_path,
        callbacks=callbacks,
        max_epochs=9,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        num_sanity_val_steps=0,
    )
    run.fit(model, loader(), loader(samples=8))
    assert run.current_epoch < 9
    assert run.global_step == 3 * run.current_epoch
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_clipping_counts_the_cells_once(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Clipped(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            squares = {id(p): float(p.grad.square().sum()) for p in self.parameters()}
            total = torch.nn.utils.clip_grad_norm_(self.parameters(), float("inf"))
            norms.append((float(total), sum(squares.values()) ** 0.5))

    trainer(tmp_path, callbacks=[KWCallback(RECIPE)], gradient_clip_val=0.5).fit(Clipped(), loader())
    assert len(norms) == 5
    for found, expected in norms:
        assert found == pytest.approx(expected, rel=1e-5)


class CellPruning(ModelPruning):
    PARAMETER_NAMES = ("weight", "bias", "cells")


@pytest.mark.parametrize("permanent", [True, False])
def test_pruning_of_cells_too(tmp_path: Path, permanent: bool) -> None:
    first = {"apply_pruning": lambda epoch: epoch == 0, "make_pruning_permanent": permanent}
    model = Losses()
    pruning = CellPruning("l1_unstructured", amount=0.5, use_global_unstructured=False, **first)
    trainer(tmp_path, callbacks=[KWCallback(RECIPE), pruning], max_epochs=3).fit(model, loader())
    for warehouse in warehouses(model).values():
        assert float((warehouse.cells == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert model.losses[-1] < model.losses[0]


def test_finetuning_of_a_frozen_part(tmp_path: Path) -> None:
    class Backbone(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    recipe = {"kw": 1, "name": "deep", "warehouses": {"a": {"layers": ["conv?"]}}, "temperature": {"steps": 5}}
    model = Backbone()
    model.extra = nn.Parameter(torch.zeros(()))
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    run = trainer(tmp_path, callbacks=[KWCallback(recipe, module="net"), finetuning], max_epochs=2)
    model.training_step = lambda batch, batch_idx: (
        nn.functional.cross_entropy(model(batch[0]), batch[1]) + model.extra.square()
    )
    run.fit(model, loader())
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in model.net.conv1.parameters()} <= trained


def test_summaries_count_every_parameter_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Classifier()
    model.example_input_array = dataset().tensors[0]
    callbacks = [KWCallback(RECIPE), RichModelSummary(max_depth=4), ModelSummary(max_depth=4)]
    trainer(tmp_path, callbacks=callbacks, enable_model_summary=True, fast_dev_run=True).fit(model, loader())
    summary = summarize(model, max_depth=-1)
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "net.conv1.attention" in str(summary)
    assert "KWConv2d" in capsys.readouterr().out + str(summary)


class Counting:
    """A compiler that only counts what it is asked to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_compiled_once_for_all_steps_and_temperatures(tmp_path: Path, dynamo: Any) -> None:
    counting = Counting()
    torch.manual_seed(0)
    compiled, plain = Losses(), Losses()
    plain.load_state_dict(compiled.state_dict())
    compiled.net.compile(backend=counting, fullgraph=True)  # an error at the first graph break
    for model in (compiled, plain):
        torch.manual_seed(1)
        trainer(tmp_path, callbacks=[KWCallback(RECIPE)], max_epochs=3).fit(model, loader())
    assert counting.graphs == 1
    assert dynamo["stats"]["unique_graphs"] == 1
    assert sum(dynamo["graph_break"].values()) == 0
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_compiled_lightning_module(tmp_path: Path, dynamo: Any) -> None:
    model = Losses()
    run = trainer(tmp_path, callbacks=[KWCallback(RECIPE)], max_epochs=1)
    run.fit(torch.compile(model, backend="eager"), loader())
    graphs = dynamo["stats"]["unique_graphs"]
    assert graphs >= 1
    run.fit_loop.max_epochs = 2
    run.fit(model, loader())
    assert dynamo["stats"]["unique_graphs"] <= graphs + 1
    assert len(model.losses) == 10
    run.save_checkpoint(tmp_path / "compiled.ckpt")
    keys = torch.load(tmp_path / "compiled.ckpt")["state_dict"]
    fresh = Classifier()
    kw_lightning.convert(fresh, RECIPE)
    fresh.load_state_dict(keys)  # compiled and plain have the same names


CONFIG = """
seed_everything: 0
model:
  class_path: test_with_lightning.FromCLI
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: kw_lightning.KWCallback
      init_args:
        recipe: recipe.yaml
    - class_path: kw_lightning.callbacks.AttentionStatistics
      init_args: {folder: statistics}
"""

RECIPE_FILE = """
kw: 1
name: from-cli
warehouses:
  a:
    layers: [net.conv?]
temperature: {steps: 4}
"""


class FromCLI(Losses):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(net=Net(), lr=lr)
        self.save_hyperparameters()

    def val_dataloader(self) -> Any:
        return loader(samples=8)


@pytest.mark.parametrize("inline", [False, True])
def test_a_config_of_lightning_cli_makes_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    pytest.importorskip("jsonargparse")  # LightningCLI's own extra
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    recipe = "{kw: 1, name: inline, warehouses: {a: {layers: [net.conv?]}}, temperature: {steps: 4}}"
    Path("train.yaml").write_text(CONFIG.replace("recipe: recipe.yaml", f"recipe: {recipe}") if inline else CONFIG)
    Path("recipe.yaml").write_text(RECIPE_FILE)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "train.yaml", "--trainer.max_epochs", "2"])
    cli = LightningCLI(LightningModule, subclass_mode_model=True)
    dynamic = [name for name, module in cli.model.named_modules() if isinstance(module, KWLayer)]
    assert dynamic == ["net.conv1", "net.conv2"]
    assert float(warehouses(cli.model)["a"].temperature) == 0.0
    assert len(list(Path("statistics").iterdir())) == 2
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    loaded = kw_lightning.callbacks.load_from_checkpoint(type(cli.model), checkpoint)
    for name, value in cli.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
