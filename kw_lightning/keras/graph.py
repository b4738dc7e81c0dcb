"""A network read from a recipe: what stands where, with every shape known; and the module that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from kw_lightning.keras.arguments import Shape
from kw_lightning.keras.layer import Layer


class Backbone(Protocol):
    """A ready network that stands before the layers."""

    @property
    def name(self) -> str:
        """Return the network's name."""
        ...

    @property
    def shape(self) -> Shape:
        """Return the shape of its output, without the batch."""
        ...

    def build(self) -> nn.Module:
        """Make the network."""
        ...


@dataclass(frozen=True)
class Node:
    """A layer, a block, or several of them in a row, at its place in a graph.

    Attributes:
        name: inside the graph around it; the module's name.
        kind: the layer's Keras name or the block's name.
        inputs: names of other nodes, or of inputs, of the same graph.
        input_shapes, shape: what goes in and comes out, without the batch.
        content: the layer, the block's graph, the ready network, or the repetitions, named 0, 1, ….
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    content: Layer | Graph | Backbone | tuple[Node, ...]


@dataclass(frozen=True)
class Graph:
    """A list of layers: the whole network, or one instance of a block.

    Attributes:
        inputs: the names under which the nodes see what comes in.
        nodes: in the order of the recipe, which is the order of the modules.
        order: the nodes' names in an order in which they can run.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    order: tuple[str, ...]

    @property
    def output(self) -> Node:
        """Return the node whose output is the graph's: the last one."""
        return self.nodes[-1]


class Leaf(NamedTuple):
    """A layer (or backbone) by its full name, and the full names of the layers whose outputs it takes."""

    name: str
    node: Node
    sources: tuple[str, ...]


def leaves(graph: Graph, prefix: str = "", sources: Sequence[str] = ("input",)) -> Iterator[Leaf]:
    """Yield every layer of a graph in the order of the modules.

    Args:
        prefix: the graph's own name with a dot behind it.
        sources: the layers whose outputs are the graph's inputs.
    """
    outputs = dict(zip(graph.inputs, sources, strict=True))
    for node in graph.nodes:
        outputs[node.name] = _output_name(node, prefix)
    for node in graph.nodes:
        yield from _leaves_of(node, prefix, [outputs[name] for name in node.inputs])


def _leaves_of(node: Node, prefix: str, sources: Sequence[str]) -> Iterator[Leaf]:
    name = f"{prefix}{node.name}"
    if isinstance(node.content, Graph):
        yield from leaves(node.content, f"{name}.", sources)
    elif isinstance(node.content, tuple):
        for part in node.content:
            yield from _leaves_of(part, f"{name}.", sources)
            sources = [_output_name(part, f"{name}.")]
    else:
        yield Leaf(name, node, tuple(sources))


def _output_name(node: Node, prefix: str) -> str:
    """Return the full name of the layer whose output is the node's."""
    name = f"{prefix}{node.name}"
    if isinstance(node.content, Graph):
        return _output_name(node.content.output, f"{name}.")
    return _output_name(node.content[-1], f"{name}.") if isinstance(node.content, tuple) else name


class Step(NamedTuple):
    """One call in the forward pass: values by name, a module by name, and the values that nothing needs after it."""

    module: str
    inputs: tuple[str, ...]
    output: str
    release: tuple[str, ...]


class LayerGraph(nn.Module):
    """Runs a graph of modules; the modules are its children under their names in the recipe."""

    def __init__(self, graph: Graph) -> None:
        """Make the modules of a graph with their start values."""
        super().__init__()
        steps: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        taken = {node.name for node in graph.nodes}
        for node in graph.nodes:
            inputs = node.inputs
            for name, module in modules_of(node):
                while name != node.name and name in taken:  # a layer that is itself called conv_activation
                    name += "_"
                self.add_module(name, module)
                steps.setdefault(node.name, []).append((name, inputs))
                inputs = (node.name,)
        calls = [(module, inputs, name) for name in graph.order for module, inputs in steps[name]]
        self._inputs = graph.inputs
        self._output = graph.output.name
        self._steps = _with_releases(calls, self._output)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Run the layers on the input [batch, *shape], of a block with several inputs on all of them."""
        values = dict(zip(self._inputs, (x, *others), strict=True))
        for step in self._steps:
            module = self._modules[step.module]
            assert module is not None
            y = module(*[values[name] for name in step.inputs])
            for name in step.release:
                del values[name]
            values[step.output] = y
        return values[self._output]


def modules_of(node: Node) -> list[tuple[str, nn.Module]]:
    """Make the modules of a node, named as children of the graph around it, in the order in which they run."""
    if isinstance(node.content, Graph):
        return [(node.name, LayerGraph(node.content))]
    if isinstance(node.content, tuple):
        sequence = nn.Sequential()
        for part in node.content:
            for name, module in modules_of(part):
                sequence.add_module(name, module)
        return [(node.name, sequence)]
    if isinstance(node.content, Layer):
        return node.content.build(*node.input_shapes).named(node.name)
    return [(node.name, node.content.build())]


def _with_releases(calls: Sequence[tuple[str, tuple[str, ...], str]], output: str) -> tuple[Step, ...]:
    """Note with each call the values that no later call reads, so that inference does not keep them."""
    steps: list[Step] = []
    needed = {output}
    for module, inputs, name in reversed(calls):
        # A layer's padding and activation write the same value as the layer: it is not released, it is replaced.
        release = tuple(value for value in dict.fromkeys(inputs) if value not in needed and value != name)
        needed.discard(name)
        needed.update(inputs)
        steps.append(Step(module, inputs, name, release))
    return tuple(reversed(steps))
