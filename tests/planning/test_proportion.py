"""An attention that outgrows its cells is warned of once, and refused when it explodes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from networks import recipe
from torch import nn
from typer.testing import CliRunner

from kw_lightning import convert
from kw_lightning.callbacks.conversion import make_dynamic
from kw_lightning.cli import application
from kw_lightning.errors import RecipeError
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe


def network(*sides: tuple[int, int], kernel: int = 0) -> nn.Module:
    """Return layers (inputs, outputs) on the meta device: linear ones, or convolutions with a kernel."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Conv2d(a, b, kernel) if kernel else nn.Linear(a, b) for a, b in sides))


def narrow() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)))


def test_an_exploding_glob_is_refused_with_the_layer_and_the_key() -> None:
    model = network(*[(64, 64)] * 12, (64, 10), kernel=3)
    with pytest.raises(RecipeError) as caught:
        plan(recipe(["*"]), model)
    assert str(caught.value) == (
        "warehouses.a: found an attention of 208,442,262 parameters in 13 layers beside 448,128 in 3,501 cells of "
        '2×64×1×1 (× 465), allowed: × 64; "12" [10×64×3×3] makes the cells small: leave it out by exclude or '
        "min_channels; attention.at_most allows more"
    )
    for selector in ({"name": "*", "exclude": ["12"]}, {"name": "*", "min_channels": 16}):
        assert plan(recipe([selector]), model).parameters.ratio < 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        # Lightning's classifier: 0.1 million became 500 million
        (
            network((784, 128), (128, 256), (256, 10)),
            r'\(× 5,488\), allowed: × 64; "2" \[10×256\] .* by exclude or min_channels',
        ),
        # a U-Net
        (
            network((1, 16), (16, 32), (32, 64), (64, 128), (128, 64), (64, 32), (32, 2), kernel=3),
            r'parameters, allowed: 10,000,000,000; "0" \[16×1×3×3\] .* by exclude or min_channels',
        ),
    ],
)
def test_networks_that_exploded_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(recipe(["*"]), model)


def test_a_recipe_may_raise_or_lower_the_bound() -> None:
    model = network(*[(64, 64)] * 12, (64, 10), kernel=3)
    raised = plan(recipe(["*"], defaults={"attention": {"at_most": 500}}), model)
    assert raised.parameters.ratio > 100
    assert raised.warning is None
    with pytest.raises(RecipeError, match=r"allowed: × 2; .*cell\.spatial: whole"):
        plan(recipe({"a": {"layers": ["*"], "attention": {"at_most": 2}}}), narrow())


def test_small_attentions_are_not_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 3))
    planned = plan(recipe(["*"]), model)
    assert planned.parameters.ratio > 10
    assert planned.warning is not None


def test_a_plan_warns_in_one_sentence() -> None:
    planned = plan(recipe({"a": ["0", "1"], "b": ["2"]}), narrow())
    assert planned.warning == (
        'warehouse "a": an attention of 6,134 parameters in 2 layers beside 1,152 in 18 cells of 8×8×1×1 (× 5.32) '
        '(so it is in "b"); layers such as "0" [8×8×3×3] are small beside an attention: leave them out by exclude or '
        "min_channels, or give them cell.spatial: whole; attention.at_most says that it is meant so"
    )
    assert planned.to_dict()["warning"] == planned.warning
    assert plan(recipe(["*"], defaults={"cell": {"spatial": "whole"}}), narrow()).warning is None
    assert plan(recipe(["*"], defaults={"attention": {"at_most": 64}}), narrow()).warning is None


def test_conversion_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kw_lightning"):
        convert(narrow(), recipe(["*"]))
    assert [record.getMessage().startswith('warehouse "a": an attention of') for record in caplog.records] == [True]


def test_the_callback_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    module = LightningModule()
    module.net = narrow()
    make_dynamic(module, recipe(["net.*"]))
    said = [str(warning.message) for warning in recwarn if "an attention of" in str(warning.message)]
    assert len(said) == 1


NARROW = """\
kw: 1
model:
  input: [1, 8, 8]
  layers:
    - Conv2D: {filters: 8, kernel_size: 3}
    - Conv2D: {filters: 8, kernel_size: 3, warehouse: a}
    - Conv2D: {filters: 8, kernel_size: 3, warehouse: a}
    - GlobalAveragePooling2D
    - Dense: {units: 10}
warehouses:
  a: {}
"""


@pytest.mark.parametrize("command", [["plan"], ["fit", "--dry-run"]])
def test_the_commands_warn_on_standard_error(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "narrow.yaml"
    path.write_text(NARROW)
    warned = CliRunner().invoke(application(), [*command, str(path)])
    assert warned.exit_code == 0
    assert warned.stderr.count('warning: warehouse "a": an attention of') == 1
    refused = CliRunner().invoke(application(), [*command, str(path), "defaults.attention.at_most=2"])
    assert refused.exit_code == 2
    assert "warehouses.a: found an attention of" in refused.stderr
    meant = CliRunner().invoke(application(), [*command, str(path), "defaults.attention.at_most=20"])
    assert (meant.exit_code, meant.stderr) == (0, "")


def test_shipped_recipes_are_in_the_proportion_that_they_say() -> None:
    for name in ("digits-resnet", "digits-resnet-4x", "mobilenetv2-050-kw-1x", "resnet18-kw-1d4x"):
        assert plan(load_recipe(name)).warning is None


def test_messages_of_size_name_the_layer_and_the_key() -> None:
    model = network(*[(256, 256)] * 4, (256, 1), (3, 256), kernel=3)
    with pytest.raises(RecipeError, match=r"mixtures, allowed: at most 200,000; .* exclude or min_channels"):
        plan(recipe(["*"]), model)
