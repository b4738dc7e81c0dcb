"""Losses of 32-true and bf16-mixed on digits: pytest tests/callbacks/test_precision_on_digits.py -m slow -s"""

from __future__ import annotations

import math
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
from callback_networks import trainer
from lightning.pytorch import seed_everything

from kw_lightning.callbacks import KWCallback
from kw_lightning.fit.data import data_module
from kw_lightning.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "recipes" / "examples"
SEEDS, EPOCHS = (0, 1, 2, 3), 10


def final(folder: Path, precision: Any, seed: int) -> dict[str, float]:
    """Return the mean training loss of the last two epochs, and the accuracy after them."""
    seed_everything(seed, verbose=False)
    model = runpy.run_path(str(EXAMPLES / "own_module.py"))["Digits"]()
    losses: list[float] = []
    model.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(float(outputs["loss"]))
    run = trainer(
        folder, callbacks=[KWCallback(EXAMPLES / "digits.yaml")], precision=precision, max_epochs=EPOCHS, logger=False
    )
    data = data_module(load_recipe("digits-resnet", [f"train.seed={seed}", "data.validation=none"]))
    run.fit(model, data)
    (found,) = run.validate(model, data.test_dataloader(), verbose=False)
    last = losses[-2 * run.num_training_batches :]
    return {"loss": statistics.mean(last), "accuracy": found["val/accuracy"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bf16_mixed_ends_within_the_spread_of_seeds(tmp_path: Path) -> None:
    found = {precision: [final(tmp_path, precision, seed) for seed in SEEDS] for precision in ("32-true", "bf16-mixed")}
    for precision, runs in found.items():
        for name in ("loss", "accuracy"):
            values = [run[name] for run in runs]
            print(f"\n{precision} {name}: " + ", ".join(f"{value:.4f}" for value in values), end="")
    for name in ("loss", "accuracy"):
        full, mixed = ([run[name] for run in found[precision]] for precision in ("32-true", "bf16-mixed"))
        # The seeds' own spread: two standard errors of the difference of the means.
        spread = 2 * math.sqrt((statistics.variance(full) + statistics.variance(mixed)) / len(SEEDS))
        assert abs(statistics.mean(mixed) - statistics.mean(full)) < spread, name
        assert statistics.mean(mixed) > 0.8 or name == "loss"
