"""Keras's weights as an imported network's: which variable of which layer goes where, and in what order of axes.

Keras stores the variables of a layer by number, in the order in which the layer makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kw_lightning.errors import RunError, listed
from kw_lightning.keras.importing.archive import WeightArchive
from kw_lightning.keras.importing.conversion import Imported
from kw_lightning.keras.importing.reading import KerasLayer
from kw_lightning.keras.layer import snake_case
from kw_lightning.keras.network import read_network
from kw_lightning.recipe import load_recipe

Array = np.ndarray[Any, Any]
SHOWN = 10
BUFFERS = ("num_batches_tracked",)
"""What a batch norm counts here, and not in Keras."""
PROJECTIONS = ("query", "key", "value", "output")
"""Linear layers of an attention; Keras's names end in `_dense`."""


@dataclass(frozen=True)
class Variable:
    """One variable of a Keras layer.

    Attributes:
        group: where it lies within the layer, empty for the layer itself.
        number: its place among the variables there.
        key: of the tensor within the module.
        convert: Keras's order of axes → the module's.
    """

    group: str
    number: int
    key: str
    convert: Callable[[Array], Array]


def load_weights(imported: Imported, archive: WeightArchive) -> dict[str, Tensor]:
    """Return the state of an imported network, filled with Keras's weights.

    Args:
        imported: the network, as `import_model` gave it.
        archive: an open file of weights.

    Raises:
        RunError: variables that are missing or of another shape, all of them, **or** a file that is damaged.
    """
    with torch.device("meta"):
        state = read_network(load_recipe(imported.recipe)).build().state_dict()
    found: dict[str, Tensor] = {}
    faults: list[str] = []
    for layer, group in _groups(imported):
        place = imported.modules[layer.name]
        for variable in _variables(layer, place.moved):
            key = f"{place.name}.{variable.key}"
            path = "/".join(filter(None, (group, variable.group, "vars", str(variable.number))))
            array = archive.read(path, state[key].numel())
            if isinstance(array, str):
                faults.append(f"{layer.name}: {array}")
                continue
            tensor = torch.from_numpy(np.array(variable.convert(array), dtype=np.float32, order="C"))
            if tensor.shape == state[key].shape:
                found[key] = tensor
            else:
                faults.append(f"{layer.name}: {path} is {list(array.shape)}, and the model has another shape there")
    if faults:
        raise RunError(f"{archive.file} does not fit the model: {listed(faults, SHOWN, '; ')}")
    counters = {key: torch.zeros((), dtype=torch.long) for key in state if key.endswith(BUFFERS)}
    missing = state.keys() - found.keys() - counters.keys()
    assert not missing, f"no variable of Keras is known for {sorted(missing)}"
    return {key: (found | counters)[key] for key in state}


def _groups(imported: Imported) -> Iterator[tuple[KerasLayer, str]]:
    """Yield each layer with its group: Keras counts the layers of a class, and does not go by their names."""
    counts: dict[str, int] = {}
    for layer in imported.model.layers:
        word = snake_case(layer.kind)
        number = counts.get(word, 0)
        counts[word] = number + 1
        yield layer, f"layers/{word}_{number}" if number else f"layers/{word}"


def _variables(layer: KerasLayer, moved: bool) -> Iterator[Variable]:
    """Yield a layer's variables.

    Args:
        moved: whether the layer's data have Keras's last axis in front.
    """
    kind, config = layer.kind, layer.config
    if kind == "MultiHeadAttention":
        for name in PROJECTIONS:
            yield Variable(f"{name}_dense", 0, f"{name}.weight", _heads_out if name == "output" else _heads_in)
            if config.get("use_bias", True):
                yield Variable(f"{name}_dense", 1, f"{name}.bias", np.ravel)
        return
    given: list[tuple[str, Callable[[Array], Array]]] = []
    if kind == "SeparableConv2D":
        given = [("depthwise.weight", _depthwise), ("pointwise.weight", _kernel)]
        given += [("pointwise.bias", _same)] if config.get("use_bias", True) else []
    elif kind in ("Conv1D", "Conv2D", "Conv3D", "Dense", "DepthwiseConv2D"):
        given = [("weight", _depthwise if kind == "DepthwiseConv2D" else _kernel)]
        given += [("bias", _same)] if config.get("use_bias", True) else []
    elif kind.endswith("Normalization"):
        given = [("weight", _same)] if config.get("scale", True) else []
        given += [("bias", _same)] if config.get("center", True) else []
        if kind == "BatchNormalization":
            given += [("running_mean", _same), ("running_var", _same)]
    elif kind == "PReLU":
        given = [("alpha", _last_axis_first if moved else _same)]
    elif kind == "Embedding":
        given = [("weight", _same)]
    for number, (key, convert) in enumerate(given):
        yield Variable("", number, key, convert)


def _same(value: Array) -> Array:
    return value


def _last_axis_first(value: Array) -> Array:
    return np.moveaxis(value, -1, 0)


def _kernel(value: Array) -> Array:
    """[*size, in, out] → [out, in, *size]."""
    sides = value.ndim - 2
    return value.transpose(sides + 1, sides, *range(sides)) if sides >= 0 else value


def _depthwise(value: Array) -> Array:
    """[height, width, channels, multiplier] → [channels · multiplier, 1, height, width]."""
    if value.ndim != 4:
        return value
    height, width, channels, multiplier = value.shape
    return value.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)


def _heads_in(value: Array) -> Array:
    """[features, heads, size] → [heads · size, features]."""
    return value.reshape(len(value), -1).T if value.ndim else value


def _heads_out(value: Array) -> Array:
    """[heads, size, features] → [features, heads · size]."""
    return value.reshape(-1, value.shape[-1]).T if value.ndim else value
