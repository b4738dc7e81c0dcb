"""A model's JSON as Keras 3 writes it → its layers and how they are connected. Nothing that the file names is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kw_lightning.errors import Location, Problem, RecipeError, mistake, sentence
from kw_lightning.recipe.limits import MAX_BYTES, MAX_DEPTH, MAX_VALUES

MAX_JSON_BYTES = 8 * MAX_BYTES
"""Keras writes every default and initializer of a layer: about 2 KB for one line of a recipe."""
MAX_JSON_VALUES = 40 * MAX_VALUES
INPUT_ARGUMENTS = ("query", "value", "key", "inputs")
"""Arguments of a call that are tensors, in the order of the inputs."""
NEUTRAL_ARGUMENTS = ("mask", "training", "attention_mask", "query_mask", "value_mask", "key_mask")


@dataclass(frozen=True)
class KerasLayer:
    """One layer of a Keras model.

    Attributes:
        kind: its class, as Conv2D.
        name: in the model.
        config: its arguments as Keras has them.
        inputs: names of the layers whose outputs it takes.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class KerasModel:
    """A Keras model with one input and one output; `layers` are in Keras's order, the input left out."""

    name: str
    input_name: str
    input_shape: tuple[int, ...]
    layers: tuple[KerasLayer, ...]
    output: str


def read_model(text: str | bytes, file: str) -> KerasModel:
    """Read a model's JSON.

    Raises:
        RecipeError: no JSON, too much of it, no model of Keras 3, **or** one that is no chain or graph of layers with
            one input and one output; all that is found at once.
    """
    return _Reader(file).model(_parse(text, file))


def _parse(text: str | bytes, file: str) -> Any:
    if len(text) > MAX_JSON_BYTES:
        raise RecipeError(
            Problem(f"a model's JSON has at most {MAX_JSON_BYTES:,} bytes", location=Location(file, 1, 1))
        )
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        location = Location(file, error.lineno, error.colno)
        raise RecipeError(Problem(f"not JSON: {error.msg}", location=location)) from None
    except RecursionError:
        raise RecipeError(Problem(f"nested deeper than {MAX_DEPTH}", location=Location(file, 1, 1))) from None
    except ValueError as error:  # no UTF-8, a number of thousands of digits, NaN
        raise RecipeError(Problem(f"not JSON: {error}", location=Location(file, 1, 1))) from None
    level, count = [data], 0
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        count += len(level)
        if not level:
            return data
        if count > MAX_JSON_VALUES:
            break
    raise RecipeError(
        Problem(
            f"nested deeper than {MAX_DEPTH}, or more than {MAX_JSON_VALUES:,} values", location=Location(file, 1, 1)
        )
    )


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _no_constant(name: str) -> Any:
    raise ValueError(f"found {name}")


class _Reader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def report(self, where: str, message: str) -> None:
        self.problems.append(Problem(f"{where}: {message}", location=Location(self.file, 1, 1)))

    def model(self, data: Any) -> KerasModel:
        kind = data.get("class_name") if isinstance(data, dict) else None
        config = data.get("config") if isinstance(data, dict) else None
        if kind not in ("Sequential", "Functional", "Model") or not isinstance(config, dict):
            allowed = "the JSON of a Sequential or Functional model of Keras 3"
            self.report("model", mistake(data if kind is None else kind, allowed))
            raise RecipeError(self.problems)
        entries = config.get("layers")
        if not isinstance(entries, list) or not all(_is_layer(entry) for entry in entries):
            self.report("model", mistake(entries, "a list of layers with class_name and config, as Keras 3 writes it"))
            raise RecipeError(self.problems)
        if not entries:
            self.report("model", "it has no layers")
            raise RecipeError(self.problems)
        name = str(config.get("name", "model"))
        model = self.sequential(name, config, entries) if kind == "Sequential" else self.graph(name, config, entries)
        if self.problems:
            raise RecipeError(self.problems)
        return model

    def sequential(self, name: str, config: dict[str, Any], entries: list[dict[str, Any]]) -> KerasModel:
        first = entries[0]
        input_name, shape = "input", config.get("build_input_shape")
        if first["class_name"] == "InputLayer":
            input_name, shape, entries = _layer_name(first), first["config"].get("batch_shape", shape), entries[1:]
        layers: list[KerasLayer] = []
        for entry in entries:
            previous = layers[-1].name if layers else input_name
            layers.append(KerasLayer(entry["class_name"], _layer_name(entry), entry["config"], (previous,)))
        output = layers[-1].name if layers else input_name
        return KerasModel(name, input_name, self.shape(shape), tuple(layers), output)

    def graph(self, name: str, config: dict[str, Any], entries: list[dict[str, Any]]) -> KerasModel:
        inputs = [entry for entry in entries if entry["class_name"] == "InputLayer"]
        outputs = _histories(config.get("output_layers"))
        if len(inputs) != 1:
            self.report("model", sentence(f"{len(inputs)} inputs", "one"))
        if len(outputs) != 1:
            self.report("model", sentence(f"{len(outputs)} outputs", "one"))
        layers = []
        for entry in entries:
            if entry["class_name"] != "InputLayer":
                layer = KerasLayer(entry["class_name"], _layer_name(entry), entry["config"], self.sources(entry))
                layers.append(layer)
        shape = self.shape(inputs[0]["config"].get("batch_shape")) if inputs else ()
        input_name = _layer_name(inputs[0]) if inputs else "input"
        return KerasModel(name, input_name, shape, tuple(layers), outputs[0] if outputs else "")

    def sources(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Return the layers that a layer takes its inputs from."""
        where, nodes = _layer_name(entry), entry.get("inbound_nodes")
        if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
            self.report(where, "its connections are not written as Keras 3 writes them")
            return ()
        if len(nodes) != 1:
            self.report(where, sentence(f"{len(nodes)} calls that share its weights", "one"))
            return ()
        names = [*_tensors(nodes[0].get("args"))]
        given = nodes[0].get("kwargs") or {}
        for argument in INPUT_ARGUMENTS:
            names += _tensors(given.get(argument))
        for argument, value in given.items():
            if argument not in INPUT_ARGUMENTS and not (argument in NEUTRAL_ARGUMENTS and value in (None, False)):
                self.report(where, f"it is called with {argument}, which a recipe does not have")
        return tuple(names)

    def shape(self, batch_shape: Any) -> tuple[int, ...]:
        sides = batch_shape[1:] if isinstance(batch_shape, list) else None
        if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
            found = f"the shape {json.dumps(batch_shape)[:60]}"
            self.report("input", sentence(found, "the known shape of one sample", "keras.Input(shape=…) sets it"))
            return ()
        return tuple(sides)


def _is_layer(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("class_name"), str) and isinstance(entry.get("config"), dict)
    )


def _layer_name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["config"].get("name") or entry["class_name"])


def _tensors(value: Any) -> Iterator[str]:
    """Yield the layer of every Keras tensor among the arguments of a call."""
    if isinstance(value, list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        config = value.get("config")
        yield from _histories(config.get("keras_history") if isinstance(config, dict) else None)


def _histories(value: Any) -> list[str]:
    """Return the layers' names in `["dense", 0, 0]`, or in a list (or map) of such."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list) or not value:
        return []
    if isinstance(value[0], str):
        return [value[0]]
    return [name for item in value for name in _histories(item)]
