"""Keras's layers → the recipe's, with the same output.

Keras's data are channels last unless a model says otherwise, a recipe's channels first, input and output included.
Each tensor is followed in one of two layouts: as Keras has it, or "moved", its last axis in front. Convolutions,
pooling and batch norms of channels-last models take moved tensors; Dense, Flatten, Reshape and attention take them as
Keras has them; where the two meet, a Permute is put between. So weights need no reordering besides each kernel's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from torch import nn

from kw_lightning.errors import Location, Problem, RecipeError, mistake, sentence, shown
from kw_lightning.keras import layers as _vocabulary  # noqa: F401 -- registers the layers
from kw_lightning.keras.arguments import Shape
from kw_lightning.keras.importing.reading import KerasLayer, KerasModel, read_model
from kw_lightning.keras.initializers import INITIALIZERS
from kw_lightning.keras.layer import LAYERS, Layer, read_layer
from kw_lightning.keras.shapes import ShapeError, feature_axis

# The additions of the vocabulary, which are no layers of Keras.
OURS = {"GELU", "SiLU", "StochasticDepth", "LayerScale", "ClassToken", "SelectToken", "PositionEmbedding"}
CHANNELS_LAST, CHANNELS_FIRST = "channels_last", "channels_first"
AS_KERAS = {"Dense", "Reshape", "Permute", "Flatten", "MultiHeadAttention", "Embedding"}
# Arguments that change nothing about the function, or that are handled one by one.
SILENT = {
    "name", "trainable", "dtype", "seed", "data_format", "axis", "noise_shape", "sparse", "ragged", "mask_zero",
    "synchronized", "flash_attention", "quantization_config", "lora_rank", "lora_alpha", "gptq_unpacked_column_size",
}  # fmt: skip
TRAINING_ONLY = re.compile(r".*_(regularizer|constraint|initializer)")
PER_SIDE = {"kernel_size", "strides", "dilation_rate", "pool_size", "size"}
# Arguments with the only value that can be read.
FIXED: dict[str, object] = {
    "rms_scaling": False,
    "renorm": False,
    "use_gate": False,
    "sliding_window": None,
    "output_shape": None,
}


@dataclass(frozen=True)
class _Tensor:
    """An output in the recipe: the layer's name, its shape there, and whether Keras's last axis is in front."""

    name: str
    shape: Shape
    moved: bool


@dataclass(frozen=True)
class Place:
    """Where a Keras layer went.

    Attributes:
        name: the module's.
        moved: whether its data have Keras's last axis in front.
    """

    name: str
    moved: bool


@dataclass(frozen=True)
class Imported:
    """A Keras model as a recipe.

    Attributes:
        recipe: plain data for `load_recipe`.
        model: as read.
        modules: Keras's name of each layer → its place.
    """

    recipe: dict[str, Any]
    model: KerasModel
    modules: Mapping[str, Place]


def import_keras(text: str | bytes, *, file: str = "model.json", name: str | None = None) -> dict[str, Any]:
    """Return the recipe of a Keras model: see `import_model`."""
    return import_model(text, file=file, name=name).recipe


def import_model(text: str | bytes, *, file: str = "model.json", name: str | None = None) -> Imported:
    """Return a Keras model as a recipe.

    Args:
        text: what `model.to_json()` of Keras 3 wrote, of a Sequential or Functional model.
        file: its name for messages.
        name: the recipe's; None takes the model's.

    Raises:
        RecipeError: everything that a recipe cannot say: layers that are not in the vocabulary, layers called twice,
            several inputs or outputs, and arguments without a counterpart.
    """
    model = read_model(text, file)
    converter = _Converter(model, file)
    layers = converter.run()
    recipe_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name or model.name).strip(".-_") or "keras-model"
    recipe: dict[str, Any] = {"kw": 1, "name": recipe_name, "description": f'The Keras model "{model.name}".'[:200]}
    recipe["model"] = {"input": list(converter.input.shape), "layers": layers}
    return Imported(recipe, model, converter.modules)


class _Converter:
    def __init__(self, model: KerasModel, file: str) -> None:
        self.model, self.file = model, file
        self.problems: list[Problem] = []
        self.layers: list[dict[str, Any]] = []
        self.names: set[str] = {"input"}
        self.tensors: dict[str, _Tensor] = {}
        self.permuted: dict[tuple[str, bool], _Tensor] = {}
        self.modules: dict[str, Place] = {}
        self.input = self._input()

    def run(self) -> list[dict[str, Any]]:
        """Convert all layers; raise everything that a recipe cannot express."""
        unknown = [layer for layer in self.model.layers if layer.kind not in LAYERS or layer.kind in OURS]
        for layer in unknown:
            why = "model inside the model" if layer.kind in ("Functional", "Sequential", "Model") else "unknown layer"
            message = mistake(layer.kind, "a layer of `kw schema`", what=f"the {why}", names=set(LAYERS) - OURS)
            self.report(layer, message)
        self.tensors[self.model.input_name] = self.input
        for layer in self.model.layers:
            self._convert(layer, skip=layer in unknown)
        output = self.tensors.get(self.model.output)
        if output is not None and not self.problems:
            self._end_with(output)
        if self.problems:
            raise RecipeError(self.problems)
        return self.layers

    def report(self, layer: KerasLayer, message: str) -> None:
        self.problems.append(Problem(f'layer "{layer.name}": {message}', location=Location(self.file, 1, 1)))

    def _input(self) -> _Tensor:
        """Images come channels first; a sequence does so where a convolution or pooling takes it."""
        shape = self.model.input_shape
        readers = [layer for layer in self.model.layers if self.model.input_name in layer.inputs]
        formats = {layer.config.get("data_format") for layer in self.model.layers}
        wanted = any(_wants_moved(layer, shape) for layer in readers)
        moved = len(shape) > 1 and CHANNELS_FIRST not in formats and (len(shape) > 2 or wanted)
        return _Tensor("input", (shape[-1], *shape[:-1]) if moved else shape, moved)

    def _convert(self, layer: KerasLayer, *, skip: bool) -> None:
        inputs = [self.tensors.get(name) for name in layer.inputs]
        if skip or not inputs or None in inputs:
            if not inputs:
                self.report(layer, "it has no input")
            return
        known = [tensor for tensor in inputs if tensor is not None]
        wants = _wants_moved(layer, known[0].shape)
        known = [self._as(tensor, moved=known[0].moved if wants is None else wants) for tensor in known]
        shape, moved = known[0].shape, known[0].moved
        if layer.kind == "Flatten" and layer.config.get("data_format") == CHANNELS_FIRST and len(shape) > 1:
            # Keras flattens in the order of channels-last data whatever the format.
            known = [self._permute(known[0], (*range(2, len(shape) + 1), 1), f"{known[0].name}_channels_last", moved)]
        kind = LAYERS[layer.kind]
        arguments = self._arguments(layer, kind, shape, moved)
        soft = self._softmax_of(layer, arguments, shape, moved)
        tensor = self._emit(layer, kind, arguments, known, layer.name)
        if tensor is not None:
            self.modules[layer.name] = Place(tensor.name, moved)
        if tensor is not None and soft is not None:
            tensor = self._emit(layer, LAYERS["Softmax"], {"axis": soft}, [tensor], f"{layer.name}_softmax")
        if tensor is not None:
            self.tensors[layer.name] = tensor

    def _emit(
        self, layer: KerasLayer, kind: type[Layer], arguments: Mapping[str, Any], inputs: list[_Tensor], name: str
    ) -> _Tensor | None:
        def report(argument: str, message: str) -> None:
            self.report(layer, f"{argument}: {message}" if argument else message)

        typed = read_layer(kind, arguments, report)
        if typed is None:
            return None
        try:
            shape = typed.output_shape(*[tensor.shape for tensor in inputs])
        except ShapeError as error:
            self.report(layer, str(error))
            return None
        tensor = _Tensor(self._name(name), shape, inputs[0].moved and len(shape) > 1)
        self._append(kind.__name__, tensor.name, arguments, [given.name for given in inputs])
        return tensor

    def _append(self, kind: str, name: str, arguments: Mapping[str, Any], inputs: list[str]) -> None:
        previous = self._last() if self.layers else "input"
        sources: dict[str, Any] = {} if inputs == [previous] else {"inputs": inputs if len(inputs) > 1 else inputs[0]}
        self.layers.append({kind: {"name": name, **sources, **arguments}})

    def _last(self) -> str:
        return str(next(iter(self.layers[-1].values()))["name"])

    def _end_with(self, output: _Tensor) -> None:
        """Let the model's output be the last layer."""
        if self.layers and self._last() != output.name:
            self._append("Activation", self._name("output"), {"activation": "linear"}, [output.name])

    def _as(self, tensor: _Tensor, *, moved: bool) -> _Tensor:
        """Return a tensor in a layout, by a Permute where it is in the other one."""
        if tensor.moved == moved or len(tensor.shape) < 2:
            return tensor
        key = (tensor.name, moved)
        if key not in self.permuted:
            rank = len(tensor.shape)
            dims = (rank, *range(1, rank)) if moved else (*range(2, rank + 1), 1)
            suffix = CHANNELS_FIRST if moved else CHANNELS_LAST
            self.permuted[key] = self._permute(tensor, dims, f"{tensor.name}_{suffix}", moved)
        return self.permuted[key]

    def _permute(self, tensor: _Tensor, dims: tuple[int, ...], name: str, moved: bool) -> _Tensor:
        permuted = _Tensor(self._name(name), tuple(tensor.shape[dim - 1] for dim in dims), moved)
        self._append("Permute", permuted.name, {"dims": list(dims)}, [tensor.name])
        return permuted

    def _name(self, name: str) -> str:
        word = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:80] or "layer"
        if not (word[0].isalpha() or word.isdigit()):
            word = f"layer_{word}"
        free, number = word, 0
        while free in self.names or hasattr(nn.Module, free) or free == "training":
            number += 1
            free = f"{word}_{number}"
        self.names.add(free)
        return free

    def _arguments(self, layer: KerasLayer, kind: type[Layer], shape: Shape, moved: bool) -> dict[str, Any]:
        """Return the recipe's arguments of a layer, Keras's defaults left out."""
        found: dict[str, Any] = {}
        for argument, value in layer.config.items():
            if argument.endswith("_initializer") and argument in kind.arguments():
                value = _initializer(value)
                if value is None:  # start values of another distribution: the trained network is the same
                    continue
            if argument == "shared_axes" and value is not None:
                value = [_axis(axis, len(shape), moved) for axis in value]
            if argument in kind.arguments() and argument != "axis":
                if not _is_default(kind, argument, value):
                    found[argument] = _shortest(value) if argument in PER_SIDE else value
            elif argument in FIXED:
                if value != FIXED[argument]:
                    self.report(layer, f"{argument}: {value} cannot be written in a recipe")
            elif argument == "attention_axes":
                if value not in (None, [1]):
                    self.report(layer, f"attention_axes: {value} cannot be written in a recipe; [1] can")
            elif argument not in SILENT and not TRAINING_ONLY.fullmatch(argument) and not argument.startswith("renorm"):
                self.report(
                    layer, sentence(f"{argument}: {shown(value)}", f"arguments that {layer.kind} has in a recipe")
                )
        found.update(self._axis_argument(layer, kind, shape, moved))
        return found

    def _axis_argument(self, layer: KerasLayer, kind: type[Layer], shape: Shape, moved: bool) -> dict[str, Any]:
        axis = layer.config.get("axis")
        if isinstance(axis, list) and len(axis) == 1:
            axis = axis[0]
        if axis is None or "axis" not in layer.config:
            return {}
        if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis <= len(shape) or axis == 0:
            self.report(layer, f"axis: {axis} cannot be written in a recipe; one axis can")
            return {}
        ours = _axis(axis, len(shape), moved)
        if "axis" not in kind.arguments():  # the norms whose axis is always the channels
            if ours != 1:
                self.report(layer, f"axis: {axis} is not the channels of the data")
            return {}
        return {} if ours == feature_axis(shape) else {"axis": ours}

    def _softmax_of(self, layer: KerasLayer, arguments: dict[str, Any], shape: Shape, moved: bool) -> int | None:
        """Take a softmax over another axis than the recipe's out of a layer; return its axis."""
        if arguments.get("activation") not in ("softmax", "log_softmax"):
            return None
        last = _axis(-1, len(shape), moved)  # no layer with an activation changes the number of axes
        if last == feature_axis(shape):
            return None
        if arguments["activation"] == "log_softmax":
            self.report(layer, "log_softmax over this axis cannot be written in a recipe")
        del arguments["activation"]
        if layer.kind == "Activation":  # which has no default
            arguments["activation"] = "linear"
        return last


def _wants_moved(layer: KerasLayer, shape: Shape) -> bool | None:
    """Return the layout that a layer needs; None: any."""
    kind = LAYERS.get(layer.kind)
    if len(shape) < 2 or kind is None:
        return None
    if layer.kind in AS_KERAS:
        return False
    if kind.dimensions:
        return layer.config.get("data_format") != CHANNELS_FIRST
    if layer.kind in ("BatchNormalization", "GroupNormalization"):
        axis = layer.config.get("axis", -1)
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        return axis in (-1, len(shape))
    return None


def _axis(axis: int, rank: int, moved: bool) -> int:
    """Return Keras's axis (batch = 0) as the recipe counts it."""
    positive = axis if axis > 0 else rank + 1 + axis
    if not moved:
        return positive
    return 1 if positive == rank else positive + 1


def _is_default(kind: type[Layer], argument: str, value: Any) -> bool:
    field = kind.arguments()[argument]
    if argument == "activation" and value == "linear":
        return field.default is None
    if field.default is MISSING:
        return False
    default, read = field.default, _reader(field)
    try:
        return bool(read(value, kind.dimensions) == read(default, kind.dimensions))
    except ValueError:
        return False


def _reader(field: Any) -> Callable[[Any, int], Any]:
    return field.metadata["argument"].read  # type: ignore[no-any-return]


def _shortest(value: Any) -> Any:
    """Return [3, 3] as 3."""
    same = isinstance(value, list) and value and all(isinstance(item, int) and item == value[0] for item in value)
    return value[0] if same else value


def _initializer(value: Any) -> str | None:
    """Return the recipe's name of an initializer; None where it has none."""
    name = value.get("class_name") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        return None
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return name if name in INITIALIZERS else None
