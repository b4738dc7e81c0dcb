"""What a layer of the vocabulary is, and the register of all of them.

A layer kind is a frozen dataclass under its Keras name: its fields are its arguments with Keras's defaults, and it can
say which shape comes out of a shape and build the torch module for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import nn

from kw_lightning.errors import mistake
from kw_lightning.keras.arguments import Argument, Shape


class Parts(NamedTuple):
    """The modules of one layer, run in this order.

    Attributes:
        main: the layer; it takes the layer's name.
        before: padding that the layer itself cannot do; `NAME_pad`.
        after: the activation given as the layer's argument; `NAME_activation`.
    """

    main: nn.Module
    before: nn.Module | None = None
    after: nn.Module | None = None

    def named(self, name: str) -> list[tuple[str, nn.Module]]:
        """Return the modules that there are, with their names."""
        parts = ((f"{name}_pad", self.before), (name, self.main), (f"{name}_activation", self.after))
        return [(part, module) for part, module in parts if module is not None]


@dataclass(frozen=True)
class Layer:
    """One layer with its arguments; the base of the vocabulary."""

    dimensions: ClassVar[int] = 0
    """Spatial dimensions, of a layer that has a fixed number of them."""
    most_inputs: ClassVar[int | None] = 1
    """How many inputs it takes at most; None means any number."""
    least_inputs: ClassVar[int] = 1
    dynamic: ClassVar[Mapping[str, str]] = {}
    """Argument that names a warehouse → the submodule that is dynamic then; "" is the layer itself."""

    def output_shape(self, *inputs: Shape) -> Shape:
        """Return the output's shape for the inputs' shapes, all without the batch.

        Raises:
            ShapeError: the layer cannot take them.
        """
        raise NotImplementedError

    def build(self, *inputs: Shape) -> Parts:
        """Make the modules for inputs of these shapes, which `output_shape` has accepted."""
        raise NotImplementedError

    @classmethod
    def arguments(cls) -> dict[str, dataclasses.Field[Any]]:
        """Return the arguments by name."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @property
    def warehouses(self) -> dict[str, str]:
        """Return submodule → name of its warehouse, for those that are given one."""
        named = {submodule: getattr(self, argument) for argument, submodule in self.dynamic.items()}
        return {submodule: name for submodule, name in named.items() if name is not None}


LAYERS: dict[str, type[Layer]] = {}
"""Every layer kind by its Keras name."""

SHARED_ARGUMENTS = ("name", "inputs", "repeat")
"""Arguments of every layer and block, which the graph reads."""

L = TypeVar("L", bound=type[Layer])


def register(layer: L) -> L:
    """Add a layer kind to the vocabulary under its class name.

    Raises:
        ValueError: the name is taken, or an argument has a name that every layer uses otherwise.
    """
    if layer.__name__ in LAYERS:
        raise ValueError(f"there is a layer {layer.__name__} already")
    taken = set(layer.arguments()) & set(SHARED_ARGUMENTS)
    if taken:
        raise ValueError(f"{layer.__name__} has arguments that every layer has: {sorted(taken)}")
    LAYERS[layer.__name__] = layer
    return layer


def kind_of(field: dataclasses.Field[Any]) -> Argument:
    """Return how an argument is read."""
    kind: Argument = field.metadata["argument"]
    return kind


def snake_case(kind: str) -> str:
    """Return Keras's default name of a layer: `batch_normalization`, `conv2d`, `p_re_lu`."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", kind)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()


def unknown_argument(kind: type[Layer], name: str) -> str:
    """Return the message about an argument that a layer does not have."""
    names = [*kind.arguments(), *SHARED_ARGUMENTS]
    return mistake(name, names, what="the unknown argument")


def read_layer(kind: type[Layer], values: Mapping[str, object], report: Callable[[str, str], None]) -> Layer | None:
    """Return a layer with typed arguments.

    Args:
        kind: which layer.
        values: its arguments as they stand in the recipe; unknown ones are the caller's to report.
        report: told (argument, message) for each that is missing or wrong.

    Returns:
        The layer, or None after a report.
    """
    arguments: dict[str, Any] = {}
    complete = True
    for name, field in kind.arguments().items():
        if name not in values:
            if field.default is MISSING:
                report("", f'the argument "{name}" is missing, allowed: {kind_of(field).allowed(kind.dimensions)}')
                complete = False
            else:  # read as well: one number stands for all dimensions
                arguments[name] = kind_of(field).read(field.default, kind.dimensions)
            continue
        try:
            arguments[name] = kind_of(field).read(values[name], kind.dimensions)
        except ValueError:
            reader = kind_of(field)
            allowed, names = reader.allowed(kind.dimensions), reader.names(kind.dimensions)
            report(name, mistake(values[name], allowed, names=names))
            complete = False
    return kind(**arguments) if complete else None
