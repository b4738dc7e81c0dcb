"""Mistakes that a schema cannot see: values that do not go together. What needs the network is checked by the plan."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from kw_lightning.errors import Problem, sentence
from kw_lightning.recipe.limits import MAX_IMAGE
from kw_lightning.recipe.nodes import Node, join
from kw_lightning.recipe.scalars import read_plain, read_ratio

_LENGTH = 500  # the schema refuses longer names
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_SLICE = re.compile(r"(.*)\[([^\[\]:]*):([^\[\]:]*)\]", re.DOTALL)


def check(root: Node) -> list[Problem]:
    """Return the mistakes of a recipe that go past single values; what the schema refuses is passed over."""
    problems: list[Problem] = []
    temperature = _map(root, "temperature")
    if "epochs" in temperature and "steps" in temperature:
        place = temperature["steps"].key_location
        problems.append(Problem(sentence("epochs and steps", "one of them"), "temperature.steps", place))
    problems += _check_softmax(root)
    has_layers = "layers" in _map(root, "model")
    for name, warehouse in _map(root, "warehouses").items():
        path = join("warehouses", name)
        if not isinstance(warehouse.value, dict):
            continue
        if "layers" not in warehouse.value and not has_layers:
            message = 'the key "layers" is missing, allowed: names or globs of the layers that share this warehouse'
            problems.append(Problem(message, path, warehouse.place))
        layers = warehouse.value.get("layers", Node(None)).value
        for index, selector in enumerate(layers if isinstance(layers, list) else ()):
            problems += _check_selector(selector, f"{path}.layers[{index}]")
    problems += _check_normalisation(_child(root, "data"))
    problems += _check_fake(_child(root, "data"))
    problems += _check_sampling(_child(root, "data"))
    problems += _check_labels(root)
    for section in ("train", "eval"):
        scale = _map(_child(root, "data"), section).get("scale", Node(None))
        match scale.plain():
            case [int() | float() as least, int() | float() as most] if least > most:
                message = sentence(f"{least} before {most}", "the smaller one first")
                problems.append(Problem(message, f"data.{section}.scale", scale.place))
    return problems + _check_train(_map(root, "train"))


def _check_train(train: dict[str, Any]) -> list[Problem]:
    """Return where ways of training do not go together."""
    problems = []
    if "freeze_epochs" in train and "freeze" not in train:
        message = "found freeze_epochs without freeze, allowed: train.freeze with the layers that stay frozen so long"
        problems.append(Problem(message, "train.freeze_epochs", train["freeze_epochs"].key_location))
    mode, accumulate = train.get("compile", Node(None)), train.get("accumulate", Node(None)).plain()
    if mode.value in _CUDA_GRAPHS and isinstance(accumulate, int) and accumulate > 1:
        # https://github.com/pytorch/pytorch/issues/169545
        what = f"{mode.value} with accumulate: {accumulate}"
        hint = "CUDA graphs write each gradient over the one before"
        message = sentence(what, "accumulate: 1, or compile: true or max-autotune-no-cudagraphs", hint)
        problems.append(Problem(message, "train.compile", mode.place))
    return problems


def _check_normalisation(data: Node) -> list[Problem]:
    """Return where mean and std do not go together; evaluation has those of training where it says nothing."""
    problems = []
    train, evaluation = _map(data, "train"), _map(data, "eval")
    for section, own, options in (("train", train, train), ("eval", evaluation, {**train, **evaluation})):
        given = {key: options[key] for key in ("mean", "std") if isinstance(options.get(key, Node(None)).value, list)}
        for key in given.keys() & own.keys():
            path, place = f"data.{section}.{key}", own[key].place
            if len(given) == 1:
                what = f"{key} without {'std' if key == 'mean' else 'mean'}"
                problems.append(Problem(sentence(what, "both or neither"), path, place))
            elif len(given["mean"].children) != len(given["std"].children) and (key == "std" or "std" not in own):
                what = f"{len(given['mean'].children)} values in mean and {len(given['std'].children)} in std"
                problems.append(Problem(sentence(what, "as many in both, one for each channel"), path, place))
    return problems


def _check_softmax(root: Node) -> list[Problem]:
    """Return where the temperature of a softmax is given and there is none."""
    usual = _map(_child(root, "defaults"), "attention")
    attentions = {
        join("warehouses", name): _map(entry, "attention") for name, entry in _map(root, "warehouses").items()
    }
    attentions["stages"] = _map(_child(root, "stages"), "attention")
    functions = {path: {**usual, **own}.get("function", Node(None)).value for path, own in attentions.items()}
    others = (None, "contrast", "sigmoid", "relu")  # what is no function at all is told once
    wrong = [path for path, own in attentions.items() if "softmax_temperature" in own and functions[path] in others]
    if "softmax_temperature" in usual and all(found in others for found in functions.values()):
        wrong.append("defaults")
    attentions["defaults"] = usual
    text = sentence("softmax_temperature without softmax", "function: softmax beside it")
    return [
        Problem(text, f"{path}.attention.softmax_temperature", attentions[path]["softmax_temperature"].key_location)
        for path in wrong
    ]


def _check_sampling(data: Node) -> list[Problem]:
    """Return where images are to be drawn that a data module of one's own hands out."""
    name, sampling = _child(data, "name").value, _child(data, "sampling")
    if sampling.value != "balanced" or not isinstance(name, str) or not name.startswith("python:"):
        return []
    message = sentence("balanced with data of one's own", "each; the data module itself chooses its images")
    return [Problem(message, "data.sampling", sampling.place)]


def _check_labels(root: Node) -> list[Problem]:
    """Return what does not go with one label an image, or with several."""
    data = _map(root, "data")
    labels, name = data.get("labels", Node(None)), data.get("name", Node(None)).value
    if labels.value != "several":
        separator = _map(_child(root, "data"), "args").get("separator")
        if separator is None or name != "csv":
            return []
        message = sentence("separator with one label an image", "data.labels: several beside it")
        return [Problem(message, "data.args.separator", separator.place)]
    problems = []
    if isinstance(name, str) and name != "csv" and not name.startswith(("python:", "hf/")):
        problems.append(
            Problem(sentence(f"several with {name}", "csv, hf/… or data of one's own"), "data.labels", labels.place)
        )
    sampling, loss = data.get("sampling", Node(None)), _map(root, "train").get("loss", Node(None))
    if sampling.value == "balanced":
        hint = "try train.class_weights: balanced"
        message = sentence("balanced with several labels an image", "each", hint)
        problems.append(Problem(message, "data.sampling", sampling.place))
    if loss.value == "cross_entropy":
        message = sentence("cross_entropy with several labels an image", "bce or focal")
        problems.append(Problem(message, "train.loss", loss.place))
    return problems


def _check_fake(data: Node) -> list[Problem]:
    """Return what is wrong with made-up images that no memory holds."""
    shape = _map(data, "args").get("shape", Node(None))
    sides = shape.plain()
    if _child(data, "name").value != "fake" or not isinstance(sides, list):
        return []
    if not all(type(side) is int for side in sides) or math.prod(sides) <= MAX_IMAGE:
        return []
    message = sentence(f"an image of {math.prod(sides):,} numbers", f"at most {MAX_IMAGE:,}")
    return [Problem(message, "data.args.shape", shape.place)]


def split_slice(name: str) -> tuple[str, tuple[Fraction, Fraction] | None]:
    """Return a selector's name and the part of the output channels behind it: `qkv[2/3:]` → qkv, (2/3, 1).

    Raises:
        ValueError: a slice that is none, **or** that does not run from a smaller to a larger number in 0 to 1.
    """
    match = _SLICE.fullmatch(name)
    if match is None:
        return name, None
    name, start, stop = match.groups()
    try:
        part = (_bound(start) if start.strip() else Fraction(0)), (_bound(stop) if stop.strip() else Fraction(1))
    except ValueError:
        raise ValueError(sentence(f"the slice [{start}:{stop}]", "shares of the output channels, as [2/3:]")) from None
    if not 0 <= part[0] < part[1] <= 1:
        raise ValueError(sentence(f"the slice [{start}:{stop}]", "0 ≤ from < to ≤ 1"))
    return name, part


def _bound(text: str) -> Fraction:
    text = text.strip()
    return read_ratio(text if "/" in text else read_plain(text))


def _check_selector(selector: Node, path: str) -> list[Problem]:
    if isinstance(selector.value, dict):
        selector, path = selector.value.get("name", Node(None)), f"{path}.name"
    if isinstance(selector.value, str):
        try:
            split_slice(selector.value[:_LENGTH])
        except ValueError as error:
            return [Problem(str(error), path, selector.place)]
    return []


def _child(node: Node, key: str) -> Node:
    return node.value.get(key, Node(None)) if isinstance(node.value, dict) else Node(None)


def _map(node: Node, key: str) -> dict[str, Any]:
    value = _child(node, key).value
    return value if isinstance(value, dict) else {}
