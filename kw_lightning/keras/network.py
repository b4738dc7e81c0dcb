"""A recipe's Keras-style network: read, checked, and ready to be built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from kw_lightning import backbones
from kw_lightning.errors import RecipeError, first_line, sentence
from kw_lightning.keras import layers as _vocabulary  # noqa: F401 -- registers the layers
from kw_lightning.keras.arguments import Shape
from kw_lightning.keras.definition import read_definitions
from kw_lightning.keras.expansion import Expander, Scope
from kw_lightning.keras.graph import Graph, LayerGraph, Node, leaves
from kw_lightning.keras.layer import Layer
from kw_lightning.limits import MAX_INPUT, bounded_construction
from kw_lightning.recipe.types import Recipe

INPUT = "input"
BACKBONE = "backbone"


class SummaryRow(NamedTuple):
    """A line of the summary.

    Attributes:
        name: of the module.
        type: the layer's Keras name; of a backbone its name in the recipe.
        output_shape: without the batch.
        parameters: of the static network, buffers not counted.
        connected_to: the layers whose outputs it takes.
        warehouse: the warehouse that it draws on, nothing for a static layer.
    """

    name: str
    type: str
    output_shape: Shape
    parameters: int
    connected_to: tuple[str, ...]
    warehouse: str


@dataclass(frozen=True)
class ReadyNetwork:
    """The recipe's `model.backbone`, standing before the layers."""

    recipe: Recipe
    allow_python: tuple[str, ...]
    shape: Shape

    @property
    def name(self) -> str:
        """Return the backbone's name."""
        assert self.recipe.model is not None
        return str(self.recipe.model.backbone)

    def build(self) -> nn.Module:
        """Make the backbone, with its pretrained weights unless it is made on the meta device."""
        device = "meta" if torch.empty(0).device.type == "meta" else None
        return backbones.create(self.recipe, allow_python=self.allow_python, device=device)


@dataclass(frozen=True)
class Network:
    """A network whose shapes are known and fit.

    Attributes:
        recipe: where it comes from.
        graph: its layers.
        input_shape: [channels, *size] of one sample.
    """

    recipe: Recipe
    graph: Graph
    input_shape: Shape

    @property
    def output_shape(self) -> Shape:
        """Return the shape of one sample's output."""
        return self.graph.output.shape

    @cached_property
    def warehouses(self) -> Mapping[str, tuple[str, ...]]:
        """Return warehouse → names of the modules that draw on it, in the order of the modules.

        A recipe that declares no warehouse has none here either, whatever its layers name: it is the static network.
        """
        names: dict[str, list[str]] = {}
        for leaf in leaves(self.graph):
            for submodule, warehouse in _warehouses(leaf.node, self.recipe).items():
                names.setdefault(warehouse, []).append(f"{leaf.name}.{submodule}" if submodule else leaf.name)
        return {warehouse: tuple(modules) for warehouse, modules in names.items()}

    @cached_property
    def parameters(self) -> int:
        """Return the number of parameters of the static network."""
        return sum(parameter.numel() for parameter in self._on_meta.parameters())

    def build(self) -> nn.Module:
        """Make the static network with its start values.

        Raises:
            TooLargeError: more parameters than a recipe may ask for.
        """
        _ = self.parameters  # passes the limits without memory, or raises
        return LayerGraph(self.graph)

    def summary(self) -> tuple[SummaryRow, ...]:
        """Return the lines of Keras's `summary()`, in the order of the modules."""
        model = self._on_meta
        rows = [SummaryRow(INPUT, "Input", self.input_shape, 0, (), "")]
        for name, node, sources in leaves(self.graph):
            parameters = sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
            warehouse = ", ".join(dict.fromkeys(_warehouses(node, self.recipe).values()))
            kind = node.content.name if isinstance(node.content, ReadyNetwork) else node.kind
            rows.append(SummaryRow(name, kind, node.shape, parameters, sources, warehouse))
        return tuple(rows)

    @cached_property
    def _on_meta(self) -> nn.Module:
        with torch.device("meta"), bounded_construction("the network"):
            return LayerGraph(self.graph)


def read_network(recipe: Recipe, *, allow_python: Sequence[str] = ()) -> Network:
    """Read and check the network in a recipe's `model.layers`.

    Args:
        recipe: its `model` and the names of its warehouses are used.
        allow_python: packages whose code `model.backbone` may import and run.

    Raises:
        RecipeError: every mistake of the network at once, each with its place, the shapes, and the way through blocks
            by which it came.
    """
    document, model = recipe.document, recipe.model
    if model is None or not model.layers:
        raise RecipeError(document.problem("model", "a Keras-style network needs model.layers"))
    definitions = read_definitions(model.layers, model.blocks, document)
    problems = definitions.problems
    shape: Shape | None = tuple(model.input) if model.input is not None else None
    ready = None
    try:
        if model.backbone is not None:
            ready, shape = _backbone(recipe, tuple(allow_python))
    except RecipeError as error:
        problems += error.problems
    else:
        if shape is None:
            problems.append(document.problem("model", "a network needs model.input: [channels, height, width]"))
    if shape is not None and (math.prod(shape) > MAX_INPUT or min(shape, default=0) < 1):
        problems.append(
            document.problem("model.input", sentence(f"an input {list(shape)}", f"1 to {MAX_INPUT:,} numbers"))
        )
        shape = None
    expander = Expander(definitions, document, _declared(recipe))
    graph = None
    if not definitions.endless:
        try:
            graph = expander.graph(definitions.calls, Scope(), {INPUT: shape}, ready)
        except RecipeError as error:
            raise RecipeError([*problems, *error.problems]) from None
    problems = [*problems, *expander.problems]
    if problems or graph is None or shape is None:
        raise RecipeError(problems)
    return Network(recipe, graph, shape)


def _declared(recipe: Recipe) -> list[str]:
    """Return the warehouses that layers may name: those of `stages` are found in a network of static ones."""
    return [warehouse.name for warehouse in recipe.warehouses if warehouse.path != "stages"]


def _warehouses(node: Node, recipe: Recipe) -> dict[str, str]:
    """Return submodule → warehouse of a layer; nothing when the recipe declares no warehouse."""
    return node.content.warehouses if isinstance(node.content, Layer) and _declared(recipe) else {}


def _backbone(recipe: Recipe, allow_python: tuple[str, ...]) -> tuple[Node, Shape]:
    """Return the backbone as the graph's first node, and the shape of its input."""
    assert recipe.model is not None
    network = backbones.create(recipe, allow_python=allow_python, device="meta").eval()
    shape = backbones.input_shape(recipe, network)
    if shape is None:
        raise RecipeError(recipe.document.problem("model", "the backbone needs model.input: [channels, height, width]"))
    try:
        with torch.no_grad():
            output = network(torch.empty(1, *shape, device="meta"))
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it returns a {type(output).__name__}, and layers take one tensor")
    except Exception as error:  # whatever a stranger's forward pass can raise
        message = f"the backbone does not run on one input of {list(shape)}: {first_line(error)}"
        raise RecipeError(recipe.document.problem("model.backbone", message)) from error
    ready = ReadyNetwork(recipe, allow_python, tuple(output.shape[1:]))
    return Node(BACKBONE, "backbone", (INPUT,), (shape,), ready.shape, ready), shape
