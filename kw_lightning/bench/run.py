"""From a recipe to its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from kw_lightning.bench.layers import LayerResult, bench_layers
from kw_lightning.bench.networks import NetworkResult, Setting, bench_network, check_batch_norms
from kw_lightning.builder import apply_plan, make_static
from kw_lightning.errors import KWError, mistake, times
from kw_lightning.nn import set_temperature
from kw_lightning.nn.engine import ENGINES
from kw_lightning.planning import Plan, plan
from kw_lightning.recipe.classes import USUAL, with_classes
from kw_lightning.recipe.types import Recipe

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """The figures of one recipe.

    Attributes:
        name: of the recipe.
        setting: as measured.
        networks: training and inference.
        layers: the dynamic layers one by one; empty if not asked for.
    """

    name: str
    setting: Setting
    networks: Sequence[NetworkResult]
    layers: Sequence[LayerResult]

    @property
    def title(self) -> str:
        """Return the recipe's name and the input."""
        batch, _, *size = self.setting.shape
        return f"{self.name}, batch {batch}, {times(size)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "name": self.name,
            "input": list(self.setting.shape),
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "device": str(self.setting.device),
            "channels_last": self.setting.channels_last,
            "compiled": self.setting.compiled,
            "repeats": self.setting.repeats,
            "networks": [result.to_dict() for result in self.networks],
            "layers": [result.to_dict() for result in self.layers],
        }


@dataclass(frozen=True)
class Bench:
    """What is to be measured, found to be possible.

    Attributes:
        recipe: its network is made twice, static and with warehouses.
        plan: of the recipe, for the input.
        setting: with the input's whole shape.
    """

    recipe: Recipe
    plan: Plan
    setting: Setting


def prepare_bench(recipe: Recipe, setting: Setting, *, size: int | None = None, engine: str | None = None) -> Bench:
    """Check that a recipe's network can be measured, before anything is.

    Args:
        recipe: the recipe.
        setting: of its shape only the batch is used.
        size: of every spatial dimension of the input; None takes the network's usual.
        engine: of every layer; None leaves the recipe's.

    Raises:
        RecipeError: a recipe, or an engine, that does not fit its network.
        KWError: an unknown engine, a network whose input is not known, **or** one that cannot train on the input.
    """
    if engine is not None and engine not in ENGINES:
        raise KWError(mistake(engine, ENGINES, what="the unknown engine"))
    recipe = with_classes(recipe, USUAL)
    recipe = replace(recipe, engine=engine or recipe.engine)
    if recipe.model is not None and recipe.model.pretrained:
        recipe = replace(recipe, model=replace(recipe.model, pretrained=False))
    usual = plan(recipe).input_shape
    if usual is None:
        raise KWError(f'the input of "{recipe.name}" is not known: give its size in the recipe, as data or model.input')
    shape = (usual[0], *[size] * (len(usual) - 1)) if size is not None else usual
    planned = plan(recipe, input_shape=shape)
    setting = replace(setting, shape=(setting.shape[0], *shape))
    check_batch_norms(make_static(recipe), setting, recipe.name)
    return Bench(recipe, planned, setting)


def run_bench(bench: Bench, *, layers: bool = True) -> Report:
    """Measure a network at temperature 0, as it is after the first epochs; the weights are random.

    Args:
        bench: what to measure.
        layers: measure the layers one by one, too.

    Raises:
        KWError: torch.compile cannot compile a network, as without a C++ compiler.
    """
    static = make_static(bench.recipe)
    kw = apply_plan(bench.plan, make_static(bench.recipe)).model
    set_temperature(kw, 0.0)
    try:
        networks = bench_network(static, kw, bench.setting, () if bench.plan.macs is None else bench.plan.macs)
    except TorchDynamoException as error:
        why = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        raise KWError(f'torch.compile cannot compile "{bench.recipe.name}": {why}') from error
    return Report(bench.recipe.name, bench.setting, networks, bench_layers(kw, bench.setting) if layers else [])


def parse_dtype(name: str) -> torch.dtype:
    """Return a type by name.

    Raises:
        KWError: an unknown one.
    """
    if name not in DTYPES:
        raise KWError(mistake(name, DTYPES, what="the unknown dtype"))
    return DTYPES[name]


def parse_mode(name: str) -> str:
    """Return a mode of torch.compile.

    Raises:
        KWError: an unknown one.
    """
    modes = ("default", *torch._inductor.list_mode_options())
    if name not in modes:
        raise KWError(mistake(name, dict.fromkeys(modes), what="the unknown mode"))
    return name


def parse_device(name: str) -> torch.device:
    """Return a device by name.

    Raises:
        KWError: an unknown one, or one that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise KWError(mistake(name, "cpu, cuda or cuda:1", what="the unknown device")) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KWError(f'device "{name}" is not there: torch finds no GPU')
    return device
