"""`kw new`: a first recipe for a network, with one warehouse for each stage that it has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kw_lightning.cli.arguments import package_option
from kw_lightning.cli.output import warn
from kw_lightning.cli.own_data import data_text, size_for
from kw_lightning.errors import RecipeError, RunError, times
from kw_lightning.paths import user_path, writable
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.writing import to_yaml

if TYPE_CHECKING:
    from torch import nn

    from kw_lightning.fit.data.looking import Look
    from kw_lightning.planning import Stage
    from kw_lightning.recipe.types import Recipe

_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")
_MAX_NUMBERS = 4

_TEMPLATE = """\
# yaml-language-server: $schema=recipe-1.schema.json
# For completion in an editor: kw schema > recipe-1.schema.json. To see what it makes of the network: kw plan {file}
kw: 1
name: {name}
description: {title}, one warehouse for each stage.

{model}
defaults:
  budget: 1                 # cells per mixture: 1 has as many as the static kernels, 1/2 half of them, 4 four times
  cell: {{out: 1, in: 1}}     # smaller shares give smaller and more cells
  attention: {{reduction: 1/16, norm: batch}}

# Found from the sizes of the feature maps{handover}.
# Everything that is not named here stays static.
{warehouses}
{training}"""
_TRAINING = """\
temperature: {{end: 0, epochs: 20}}

data:
  name: image_folder        # or csv, digits, cifar10, cifar100, mnist, fashion_mnist, fake
  root: ~/data              # with the folders train and val, one folder a class
  batch_size: 128
  workers: 4
  # Mean, std and interpolation, and in evaluation the crop, are those of the network's weights: `kw plan` shows them.
  train: {{crop: random_resized, size: {size}, flip: true}}

train:
  epochs: 300
  optimizer: {{name: AdamW, lr: 1.0e-3, weight_decay: 0.05}}
  schedule: {{name: cosine, warmup_epochs: 20}}
  label_smoothing: 0.1
"""


def new(
    name: Annotated[str, typer.Argument(help="Name of the recipe.")],
    backbone: Annotated[str, typer.Option("--from", metavar="BACKBONE", help="The network, as torchvision/resnet34.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write. [default: NAME.yaml]")] = None,
    input: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Shape of one sample, as 3,224,224. [default: the network's usual one]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|TABLE",
            help="Your images: a folder of class folders, or a CSV path,label[,split]; several labels as a;b.",
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the network's usual weights.")] = False,
    handover: Annotated[
        bool, typer.Option(help="Give the layers that lead into a stage to the stage before, as the paper does.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    allow_python: Annotated[list[str] | None, package_option("Let BACKBONE name things")] = None,
) -> None:
    """Write a commented recipe for a network, its warehouses found from the network's structure."""
    file = user_path(output or f"{name}.yaml")
    if file.exists() and not force:
        raise RunError(f"{file} is there already; --force writes over it")
    try:
        shape = tuple(int(number) for number in input.split(",")) if input else None
    except ValueError:
        raise typer.BadParameter(f'found --input "{input}", allowed: numbers such as 3,224,224') from None
    allowed = tuple(allow_python or ())
    own = _look(data)
    text = recipe_text(
        name, backbone, str(file), shape=shape, handover=handover, allow_python=allowed, own=own, pretrained=pretrained
    )
    with writable(file) as partial:
        partial.write_text(text, encoding="utf-8")
    for line in own[0].lines() if own is not None else ():
        typer.echo(line, err=True)
    typer.echo(f"Wrote {file}. To see what it makes of the network: kw plan {file}", err=True)
    if own is not None:
        typer.echo(f"To look for damaged images: kw check {file} --data; to train: kw-fit {file}", err=True)


def _look(data: Path | None) -> tuple[Look, Path] | None:
    """Return what a look at the user's images finds, and where they are."""
    if data is None:
        return None
    # slow to import: torch
    from kw_lightning.fit.data.listing import list_images
    from kw_lightning.fit.data.looking import look
    from kw_lightning.fit.data.sets import source_of

    listing = list_images(user_path(data))
    source_of(listing)  # its mistakes
    return look(listing), data


def recipe_text(
    name: str,
    backbone: str,
    file: str,
    *,
    shape: Sequence[int] | None = None,
    handover: bool = True,
    allow_python: Sequence[str] = (),
    own: tuple[Look, Path] | None = None,
    pretrained: bool = False,
) -> str:
    """Return a commented recipe for a backbone.

    Args:
        name: of the recipe.
        backbone: as a recipe names it.
        file: name of the file that the recipe will be in, for its comments.
        shape: [channels, *size] of one sample; None takes the network's usual one.
        handover: give the layers that lead into a stage to the stage before.
        allow_python: packages whose code the backbone may be.
        own: a look at the user's images, and where they are.
        pretrained: start from the network's usual weights.

    Raises:
        RecipeError: no such name or backbone.
        KWError: a network without stages, one whose input is not known, **or** that does not tell images apart.
    """
    given = {"input": list(shape)} if shape else {}
    recipe = load_recipe({"kw": 1, "name": name, "model": {"backbone": backbone, **given}})
    # slow to import: torch
    from kw_lightning.backbones import create, input_shape
    from kw_lightning.planning import find_stages
    from kw_lightning.planning.network import survey

    network = create(recipe, allow_python=allow_python, device="meta")
    args = {"aux_logits": False} if getattr(network, "aux_logits", False) else {}  # only one answer is trained
    if args:
        recipe = load_recipe({"kw": 1, "name": name, "model": {"backbone": backbone, "args": args, **given}})
        network = create(recipe, allow_python=allow_python, device="meta")
    found = input_shape(recipe, network)
    if found is None:
        raise RunError(f'the input of "{backbone}" is not known; give it, as --input 3,224,224')
    if own is not None and shape is None and not pretrained:
        found = _smaller(network, found, own[0])
    if own is not None:
        _check_answers(backbone, network, found)
    stages = find_stages(network, found, handover=handover)
    names = [layer.name for layer in survey(network).layers]
    classes = _classes(recipe, network, found, allow_python)
    size = found[-1]
    return _TEMPLATE.format(
        file=file,
        name=name,
        title=backbone.partition("/")[2] or backbone,
        model=_model(backbone, found, "auto" if own is not None and classes else classes, pretrained, alone=bool(args)),
        warehouses=_warehouses(stages, names),
        handover="; layers that lead into a stage belong to the one before" if handover else "",
        training=_TRAINING.format(size=size) if own is None else data_text(*own, size=size, pretrained=pretrained),
    )


def _smaller(network: nn.Module, shape: tuple[int, ...], own: Look) -> tuple[int, ...]:
    """Return the shape at which the user's images train, where it is smaller and the network takes it."""
    from kw_lightning.planning.tracing import trace

    if len(shape) != 3:
        return shape
    side = size_for(own, shape[-1])
    smaller = (shape[0], side, side)
    return smaller if side < shape[-1] and trace(network, smaller).failure is None else shape


def _check_answers(backbone: str, network: nn.Module, shape: Sequence[int]) -> None:
    """Look whether a network takes images and answers in classes, as far as a pass without weights shows it.

    Raises:
        RunError: it does not.
    """
    from kw_lightning.planning.tracing import trace

    needed = "--data trains on images by class"
    if len(shape) != 3:
        raise RunError(f'{needed}: found "{backbone}" for samples {list(shape)}, allowed: [channels, height, width]')
    calls = trace(network, shape).calls_of([""])
    if not calls:
        warn(f'{needed}: whether "{backbone}" answers in classes shows only where it runs, as in kw-fit')
    elif len(outputs := calls[0].outputs) != 2:
        raise RunError(f'{needed}: found "{backbone}" with answers {list(outputs)}, allowed: [batch, classes]')


def _classes(recipe: Recipe, network: nn.Module, shape: Sequence[int], allow_python: Sequence[str]) -> int | None:
    """Return the classes that the backbone tells apart, if its constructor takes their number as `num_classes`."""
    # slow to import: torch
    from kw_lightning.backbones import create
    from kw_lightning.planning.tracing import trace

    outputs = [call.outputs for call in trace(network, shape).calls_of([""])]
    if recipe.model is None or not outputs or len(outputs[0]) < 2:
        return None
    classes = outputs[0][1]
    asked = replace(recipe, model=replace(recipe.model, args={**recipe.model.args, "num_classes": classes}))
    try:
        same = create(asked, allow_python=allow_python, device="meta")
    except RecipeError:
        return None
    return classes if _parameters(same) == _parameters(network) else None


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _model(
    backbone: str, shape: Sequence[int], classes: int | str | None, pretrained: bool, *, alone: bool = False
) -> str:
    weights = {"pretrained": True} if pretrained else {}
    text = to_yaml({"model": {"backbone": backbone, "input": list(shape), **weights}})
    if classes is None:
        return text
    more = ", aux_logits: false" if alone else ""
    return text + f"  args: {{num_classes: {classes}{more}}}".ljust(27) + " # as many as the data has\n"


def _warehouses(stages: Iterable[Stage], names: Sequence[str]) -> str:
    lines = ["warehouses:"]
    for stage in stages:
        layers = to_yaml({"layers": globs(stage.layers, names), **_settings(stage)}).splitlines()
        counted = f"{len(stage.layers)} layer{'' if len(stage.layers) == 1 else 's'}"
        lines.append(f"  {stage.name}:".ljust(24) + f"  # {counted}, {times(stage.size)}")
        lines += [f"    {line}" for line in layers]
    return "\n".join(lines) + "\n"


def _settings(stage: Stage) -> dict[str, dict[str, str]]:
    """Return the cells and the attention of a stage where they are not those of the template's defaults."""
    cell, attention = stage.cell, stage.attention
    written = {
        "cell": {
            "out": (str(cell.out), "1"),
            "in": (str(cell.in_), "1"),
            "spatial": (cell.spatial, "split"),
        },
        "attention": {
            "reduction": (str(attention.reduction), "1/16"),
            "basis": ("none" if attention.basis is None else str(attention.basis), "none"),
        },
    }
    changed = {
        section: {key: value for key, (value, usual) in values.items() if value != usual}
        for section, values in written.items()
    }
    return {section: values for section, values in changed.items() if values}


def globs(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return few globs that match the wanted layers and none of the others.

    Args:
        wanted: names of layers, with a slice behind them if a part is meant.
        names: of all layers of the network.
    """
    # slow to import: torch
    from kw_lightning.planning.selection import matcher

    left = dict.fromkeys(wanted)
    found = []
    while left:
        best, covered = next(iter(left)), [next(iter(left))]
        for glob in _candidates(next(iter(left))):
            part = _slice(glob)
            matches = matcher(glob.removesuffix(part))
            hits = {f"{name}{part}" for name in names if matches(name)}
            if hits <= set(wanted) and len(hits & set(left)) > len(covered):
                best, covered = glob, [name for name in left if name in hits]
        found.append(best)
        left = {name: None for name in left if name not in covered}
    return found


def _candidates(name: str) -> Iterable[str]:
    """Yield a name with some of its numbers replaced: by `*` or, behind a word, by `?`; or by any digit but 0."""
    part = _slice(name)
    pieces = re.split(r"(\d+)", name.removesuffix(part))
    numbers = range(1, len(pieces), 2)[:_MAX_NUMBERS]
    for choice in itertools.product(range(3), repeat=len(numbers)):
        changed = list(pieces)
        for position, chosen in zip(numbers, choice, strict=True):
            index = not pieces[position - 1] or pieces[position - 1].endswith(".")
            wild = "*" if index or len(pieces[position]) > 1 else "?"
            changed[position] = (pieces[position], wild, "[!0]")[chosen]
        yield "".join(changed) + part


def _slice(name: str) -> str:
    match = _SLICE.search(name)
    return match.group(0) if match else ""
