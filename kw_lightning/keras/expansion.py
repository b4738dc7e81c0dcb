"""From definitions to a graph: blocks put in place with their parameters, inputs connected, every shape inferred.

Nothing is built here. A layer whose input is not known, for a mistake before it, is still checked in its arguments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from kw_lightning.errors import Problem, RecipeError, listed, mistake, sentence
from kw_lightning.keras.arguments import REFERENCE, Shape
from kw_lightning.keras.definition import NAME, Call, Definitions
from kw_lightning.keras.graph import Graph, Node
from kw_lightning.keras.layer import LAYERS, Layer, read_layer, snake_case
from kw_lightning.keras.ordering import in_order
from kw_lightning.keras.shapes import ShapeError, written
from kw_lightning.limits import MAX_INPUT, MAX_MODULES
from kw_lightning.recipe.types import Document

SHOWN_ROUTE, SHOWN_NAMES = 6, 12
"""Most blocks of a route, and most names to choose from, in a message."""

Content = Layer | Graph | tuple[Node, ...] | None


@dataclass(frozen=True)
class Scope:
    """Where a list of layers stands: the parameters in force, and the blocks by which one came here.

    Attributes:
        prefix: the modules' name up to here, with a dot behind it.
        route: (module name, key path) of each block call on the way, outermost first.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    route: tuple[tuple[str, str], ...] = ()


class _Item(NamedTuple):
    """A call with the references resolved and the graph's own arguments taken out."""

    call: Call
    name: str
    inputs: tuple[str, ...]
    repeat: int | None
    arguments: dict[str, Any]


class Expander:
    """Expands the definitions of one recipe, and gathers its mistakes."""

    def __init__(self, definitions: Definitions, document: Document, warehouses: Iterable[str]) -> None:
        self.blocks = definitions.blocks
        self.document = document
        self.warehouses = tuple(warehouses)
        # The same mistake in every repetition of a block is one: (path, message) → the first route.
        self.found: dict[tuple[str, str], str] = {}
        self.places: Counter[tuple[str, str]] = Counter()
        self.count = 0

    @property
    def problems(self) -> list[Problem]:
        """Return what was found, each mistake once, with the way through blocks by which one comes to it."""
        problems = []
        for (path, message), route in self.found.items():
            more = self.places[path, message] - 1
            also = f" and in {more} other place{'s' if more > 1 else ''}" if more and route else ""
            problems.append(self.document.problem(path, f"{message}{route}{also}"))
        return problems

    def graph(
        self,
        calls: Sequence[Call],
        scope: Scope,
        inputs: Mapping[str, Shape | None],
        ready: Node | None = None,
    ) -> Graph | None:
        """Return the graph of a list of layers, or None after a mistake.

        Args:
            calls: the layers, in the recipe's order.
            inputs: name → shape of what comes in; None where it is not known.
            ready: a node that stands before the layers: the backbone.
        """
        items = self._items(calls, scope, tuple(inputs), ready)
        order = self._order(items, scope, {*inputs, *([ready.name] if ready else [])})
        shapes: dict[str, Shape | None] = dict(inputs)
        nodes: dict[str, Node] = {}
        if ready is not None:
            shapes[ready.name], nodes[ready.name] = ready.shape, ready
        for item in order:
            node = self._node(item, [shapes.get(name) for name in item.inputs], scope)
            shapes[item.name] = node.shape if node is not None else None
            if node is not None:
                nodes[item.name] = node
        self._unused(items, scope, inputs, ready)
        if len(nodes) < len(items) + (ready is not None) or not items:
            return None
        names = [item.name for item in items]
        first = [ready.name] if ready is not None else []
        return Graph(
            tuple(inputs),
            tuple(nodes[name] for name in [*first, *names]),
            (*first, *(item.name for item in order)),
        )

    def report(self, scope: Scope, path: str, message: str) -> None:
        """Note a mistake at a key path."""
        route = ""
        if scope.route:
            steps = [self._step(where) for _, where in scope.route]
            if len(steps) > SHOWN_ROUTE:
                steps[SHOWN_ROUTE // 2 : -SHOWN_ROUTE // 2] = ["…"]
            route = f" (in {scope.route[-1][0]}, by {' → '.join(steps)})"
        self.found.setdefault((path, message), route)
        self.places[path, message] += 1

    def _step(self, path: str) -> str:
        location = self.document.location(path)
        return f"{path} (line {location.line})" if location is not None else path

    def _items(self, calls: Sequence[Call], scope: Scope, inputs: tuple[str, ...], ready: Node | None) -> list[_Item]:
        resolved = [(call, _resolve(call.arguments, scope.parameters)) for call in calls]
        taken = {*inputs, *([ready.name] if ready else [])}
        names: list[str] = []
        for call, arguments in resolved:
            names.append(self._explicit_name(call, arguments, scope, taken))
        for index, (call, _) in enumerate(resolved):
            if not names[index]:
                names[index] = _free_name(snake_case(call.kind) if call.kind in LAYERS else call.kind, taken)
                taken.add(names[index])
        items: list[_Item] = []
        previous = ready.name if ready else inputs[0]
        for index, (call, arguments) in enumerate(resolved):
            sources = self._inputs(call, arguments, scope, previous)
            if "inputs" not in arguments and index == 0 and len(inputs) > 1:
                self.report(
                    scope, call.path, f"the first layer says which of the block's inputs it takes: {', '.join(inputs)}"
                )
            repeat = self._repeat(call, arguments, scope, sources)
            rest = {key: value for key, value in arguments.items() if key not in ("name", "inputs", "repeat")}
            items.append(_Item(call, names[index], sources, repeat, rest))
            previous = names[index]
        return items

    def _explicit_name(self, call: Call, arguments: Mapping[str, Any], scope: Scope, taken: set[str]) -> str:
        """Return the name that a layer gives itself, or nothing."""
        if "name" not in arguments:
            return ""
        name, path = arguments["name"], f"{call.path}.name"
        name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
        if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 100:
            self.report(scope, path, mistake(name, "a word such as conv_a"))
            return ""
        if hasattr(nn.Module, name) or name in ("input", "training"):
            self.report(scope, path, f'"{name}" has a meaning of its own in a module; take another name')
            return ""
        if name in taken:
            self.report(scope, path, f'the name "{name}" is taken in the same list of layers')
            return ""
        taken.add(name)
        return name

    def _inputs(self, call: Call, arguments: Mapping[str, Any], scope: Scope, previous: str) -> tuple[str, ...]:
        if "inputs" not in arguments:
            return (previous,)
        value = arguments["inputs"]
        names = [value] if isinstance(value, str | int) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str | int) for n in names):
            message = mistake(value, "the name of a layer, or a list of them")
            self.report(scope, f"{call.path}.inputs", message)
            return (previous,)
        return tuple(str(name) for name in names)

    def _repeat(self, call: Call, arguments: Mapping[str, Any], scope: Scope, inputs: tuple[str, ...]) -> int | None:
        if "repeat" not in arguments:
            return None
        repeat, path = arguments["repeat"], f"{call.path}.repeat"
        if isinstance(repeat, bool) or not isinstance(repeat, int) or not 1 <= repeat <= MAX_MODULES:
            message = mistake(repeat, f"a whole number from 1 to {MAX_MODULES:,}")
            self.report(scope, path, message)
            return None
        if len(inputs) > 1:
            self.report(scope, path, sentence(f"{len(inputs)} inputs", "one, of a layer that is repeated"))
            return None
        return repeat

    def _order(self, items: Sequence[_Item], scope: Scope, known: set[str]) -> list[_Item]:
        """Return the items so that each comes after its inputs; report inputs that do not exist, and cycles."""
        by_name = {item.name: item for item in items}
        for item in items:
            for name in item.inputs:
                if name not in by_name and name not in known:
                    names = [*known, *by_name]
                    message = mistake(name, listed(names, SHOWN_NAMES), what="the unknown input", names=names)
                    self.report(scope, f"{item.call.path}.inputs", message)
        order, cycle = in_order({item.name: {n for n in item.inputs if n in by_name} for item in items})
        if cycle:
            message = f"the layers wait for each other: {' → '.join(cycle)}"
            self.report(scope, by_name[cycle[0]].call.path, message)
        return [by_name[name] for name in dict.fromkeys((*order, *by_name))]

    def _unused(self, items: Sequence[_Item], scope: Scope, inputs: Iterable[str], ready: Node | None) -> None:
        if not items:
            return
        read = {name for item in items for name in item.inputs}
        for item in items[:-1]:
            if item.name not in read:
                message = f'no layer uses the output of "{item.name}", and only the last layer is the output'
                self.report(scope, item.call.path, message)
        for name in [*inputs] if ready is None else [ready.name]:
            if name not in read:
                path = items[0].call.path.rpartition("[")[0]
                self.report(scope, path, f'no layer uses "{name}"')

    def _node(self, item: _Item, shapes: list[Shape | None], scope: Scope) -> Node | None:
        if item.repeat is None:
            return self._single(item, item.name, item.inputs, shapes, scope)
        parts: list[Node] = []
        inner = Scope(scope.parameters, f"{scope.prefix}{item.name}.", scope.route)
        current, source = shapes, item.inputs
        for index in range(item.repeat):
            part = self._single(item, str(index), source, current, inner)
            if part is None:
                return None
            parts.append(part)
            current, source = [part.shape], (str(index),)
        return Node(item.name, item.call.kind, item.inputs, parts[0].input_shapes, parts[-1].shape, tuple(parts))

    def _single(
        self, item: _Item, name: str, inputs: tuple[str, ...], shapes: list[Shape | None], scope: Scope
    ) -> Node | None:
        self.count += 1
        if self.count > MAX_MODULES:
            message = f"the network has more than {MAX_MODULES:,} layers, which is the most a recipe may ask for"
            raise RecipeError([*self.problems, self.document.problem(item.call.path, message)])
        call = item.call
        if call.kind in LAYERS:
            content: Content = self._layer(item, shapes, scope)
            shape = self._layer_shape(content, item, shapes, scope) if isinstance(content, Layer) else None
        elif call.kind in self.blocks:
            content = self._block(item, name, shapes, scope)
            shape = content.output.shape if isinstance(content, Graph) else None
        else:  # reported with the definitions
            return None
        known = [given for given in shapes if given is not None]
        if content is None or shape is None or len(known) < len(shapes):
            return None
        return Node(name, call.kind, inputs, tuple(known), shape, content)

    def _layer(self, item: _Item, shapes: list[Shape | None], scope: Scope) -> Layer | None:
        kind, path = LAYERS[item.call.kind], item.call.path

        def report(argument: str, message: str) -> None:
            self.report(scope, f"{path}.{argument}" if argument else path, message)

        layer = read_layer(kind, item.arguments, report)
        count = len(shapes)
        if count < kind.least_inputs or (kind.most_inputs is not None and count > kind.most_inputs):
            self.report(scope, path, sentence(_inputs(count), f"{_input_count(kind)} of {kind.__name__}"))
            return None
        if layer is not None:
            self._check_warehouses(kind, layer, report)
        return layer

    def _check_warehouses(self, kind: type[Layer], layer: Layer, report: Callable[[str, str], None]) -> None:
        if not self.warehouses:  # none is declared: the static network
            return
        for argument in kind.dynamic:
            name = getattr(layer, argument)
            if name is not None and name not in self.warehouses:
                report(argument, mistake(name, self.warehouses, what="the unknown warehouse"))

    def _layer_shape(self, layer: Layer, item: _Item, shapes: list[Shape | None], scope: Scope) -> Shape | None:
        path, known = item.call.path, [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        try:
            shape = layer.output_shape(*known)
        except ShapeError as error:
            named = [f"{name} is {written(given)}" for name, given in zip(item.inputs, known, strict=True)]
            self.report(scope, path, f"{error}" + (f"; {', '.join(named)}" if len(named) > 1 else ""))
            return None
        if math.prod(shape) > MAX_INPUT:
            self.report(scope, path, sentence(f"an output {written(shape)}", f"at most {MAX_INPUT:,} numbers"))
            return None
        return shape

    def _block(self, item: _Item, name: str, shapes: list[Shape | None], scope: Scope) -> Graph | None:
        block, path = self.blocks[item.call.kind], item.call.path
        if len(shapes) != len(block.inputs):
            wanted = f'the {_inputs(len(block.inputs))} of block "{block.name}", {", ".join(block.inputs)}'
            self.report(scope, path, sentence(_inputs(len(shapes)), wanted))
            return None
        missing = [parameter for parameter in block.required if item.arguments.get(parameter) is None]
        if missing:  # reported with the definitions, unless it came by a reference
            for parameter in missing:
                if parameter in item.arguments and item.call.arguments[parameter] is not None:
                    message = mistake(None, f'a value, which block "{block.name}" needs')
                    self.report(scope, f"{path}.{parameter}", message)
            return None
        given = {key: value for key, value in item.arguments.items() if key in block.parameters}
        module = f"{scope.prefix}{name}"
        inner = Scope({**block.parameters, **given}, f"{module}.", (*scope.route, (module, path)))
        return self.graph(block.calls, inner, dict(zip(block.inputs, shapes, strict=True)))


def _resolve(value: Any, parameters: Mapping[str, Any]) -> Any:
    """Return plain data with every `$name` replaced by the parameter; unknown ones are left, and reported elsewhere."""
    if isinstance(value, str):
        return parameters.get(value[1:], value) if REFERENCE.fullmatch(value) else value
    if isinstance(value, Mapping):
        return {key: _resolve(item, parameters) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(item, parameters) for item in value]
    return value


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 0, name
    while free in taken or hasattr(nn.Module, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _input_count(kind: type[Layer]) -> str:
    least, most = kind.least_inputs, kind.most_inputs
    if most is None:
        return f"at least {least} inputs (inputs: [a, b])"
    return _inputs(least) if least == most else f"{least} to {most} inputs"


def _inputs(count: int) -> str:
    return f"{count} input{'' if count == 1 else 's'}"
