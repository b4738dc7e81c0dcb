"""From plain data to definitions: the layers and blocks as they are written, with every mistake that needs no shapes.

A definition is checked once, however often the block is used: vocabulary, names of arguments, references, recursion.
What depends on the values of parameters and on shapes comes after, in `expansion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kw_lightning.errors import Problem, mistake, sentence
from kw_lightning.keras.arguments import REFERENCE
from kw_lightning.keras.layer import LAYERS, SHARED_ARGUMENTS, unknown_argument
from kw_lightning.recipe.types import Document

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*|[0-9]+")
MAX_NESTING = 32
"""Most blocks inside each other."""
WAREHOUSE = "warehouse"
"""A parameter that every block has: none unless given."""


@dataclass(frozen=True)
class Call:
    """One entry of a list of layers: a layer or a block with its arguments as they are written.

    Attributes:
        kind: the layer's Keras name, or the block's name.
        arguments: plain data; `$name` stands for a parameter of the block around it.
        path: key path of the entry, for messages.
    """

    kind: str
    arguments: Mapping[str, Any]
    path: str


@dataclass(frozen=True)
class Block:
    """A reusable list of layers.

    Attributes:
        parameters: name → default; None means that the caller must give it.
        inputs: names under which the layers see what comes in.
        calls: the layers; the last one's output is the block's.
    """

    name: str
    path: str
    parameters: Mapping[str, Any]
    inputs: tuple[str, ...]
    calls: tuple[Call, ...]

    @property
    def required(self) -> tuple[str, ...]:
        """Return the parameters without a default."""
        return tuple(name for name, default in self.parameters.items() if default is None and name != WAREHOUSE)


@dataclass
class Definitions:
    """Everything that a recipe's `model` defines, and what is wrong with it."""

    blocks: dict[str, Block] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    endless: bool = False
    """Whether blocks use themselves, or stand too deep inside each other to be expanded."""


def read_definitions(layers: object, blocks: object, document: Document) -> Definitions:
    """Read `model.layers` and `model.blocks`."""
    reader = _Reader(document, set(blocks) if isinstance(blocks, Mapping) else set())
    if isinstance(blocks, Mapping):
        for name, data in blocks.items():
            reader.block(name, data)
    elif blocks:
        reader.report("model.blocks", mistake(blocks, "a map from block names to blocks"))
    definitions = reader.definitions
    definitions.calls = reader.calls(layers, "model.layers")
    for block in definitions.blocks.values():
        reader.check_parameters(block)
        for call in block.calls:
            reader.check_call(call, block)
    for call in definitions.calls:
        reader.check_call(call, None)
    reader.check_recursion()
    return definitions


def references(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield (parameter name, key path) of every `$name` in plain data."""
    if isinstance(value, str) and value.startswith("$"):
        yield value[1:], path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from references(item, f"{path}[{index}]")


class _Reader:
    def __init__(self, document: Document, block_names: set[str]) -> None:
        self.document = document
        self.block_names = block_names
        self.definitions = Definitions()

    def report(self, path: str, message: str) -> None:
        self.definitions.problems.append(self.document.problem(path, message))

    def block(self, name: str, data: object) -> None:
        path = f"model.blocks.{name}"
        if not NAME.fullmatch(name) or name[0].isdigit():
            self.report(path, mistake(name, "a word such as residual", what="the block's name"))
        if name in LAYERS:
            self.report(path, f'"{name}" is a layer of the vocabulary; give the block another name')
        keys = ("parameters", "inputs", "layers")
        if not isinstance(data, Mapping):
            self.report(path, mistake(data, f"a map with {', '.join(keys)}"))
            data = {}
        for key in data:
            if key not in keys:
                self.report(f"{path}.{key}", mistake(str(key), keys, what="the unknown key"))
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            message = mistake(parameters, "a map from names to defaults, empty where one must be given")
            self.report(f"{path}.parameters", message)
            parameters = {}
        inputs = data.get("inputs", ["input"])
        if isinstance(inputs, str):
            inputs = [inputs]
        if not isinstance(inputs, list | tuple) or not inputs or not all(_is_name(item) for item in inputs):
            self.report(f"{path}.inputs", mistake(inputs, "a list of names for what comes in"))
            inputs = ["input"]
        calls = self.calls(data.get("layers"), f"{path}.layers")
        parameters = {WAREHOUSE: None, **{str(key): value for key, value in parameters.items()}}
        self.definitions.blocks[name] = Block(name, path, parameters, tuple(inputs), calls)

    def calls(self, data: object, path: str) -> tuple[Call, ...]:
        if not isinstance(data, list | tuple) or not data:
            self.report(path, mistake(data, "a list of at least one layer"))
            return ()
        found = (self.call(entry, f"{path}[{index}]") for index, entry in enumerate(data))
        return tuple(call for call in found if call is not None)

    def call(self, entry: object, path: str) -> Call | None:
        if isinstance(entry, str):
            return Call(entry, {}, path)
        if isinstance(entry, Mapping) and len(entry) == 1:
            kind, arguments = next(iter(entry.items()))
            path = f"{path}.{kind}"
            if arguments is None or isinstance(arguments, Mapping):
                return Call(str(kind), arguments or {}, path)
            self.report(path, mistake(arguments, f"a map of the arguments of {kind}"))
            return None
        self.report(path, mistake(entry, "the name of a layer, or one name with arguments, as Conv2D: {filters: 32}"))
        return None

    def check_parameters(self, block: Block) -> None:
        for name, default in block.parameters.items():
            path = f"{block.path}.parameters.{name}"
            if name in SHARED_ARGUMENTS:
                self.report(path, f'every layer and block has "{name}"; give the parameter another name')
            elif not REFERENCE.fullmatch(f"${name}"):
                self.report(path, mistake(name, "a word such as filters", what="the parameter's name"))
            for reference, where in references(default, path):
                self.report(where, sentence(f"the reference ${reference}", "a value; a default has no references"))
        used = {name for call in block.calls for name, _ in references(call.arguments, "")}
        for name in block.parameters:
            if name not in used and name != WAREHOUSE:
                self.report(f"{block.path}.parameters.{name}", f"no layer of the block uses ${name}")

    def check_call(self, call: Call, block: Block | None) -> None:
        if call.kind in self.definitions.blocks and call.kind not in LAYERS:
            self._check_block_call(call, self.definitions.blocks[call.kind])
        elif call.kind in LAYERS:
            kind = LAYERS[call.kind]
            for name in call.arguments:
                if name not in kind.arguments() and name not in SHARED_ARGUMENTS:
                    self.report(f"{call.path}.{name}", unknown_argument(kind, name))
        elif call.kind not in self.block_names:
            names = [*LAYERS, *self.block_names]
            blocks = f" and the blocks {', '.join(sorted(self.block_names))}" if self.block_names else ""
            message = mistake(call.kind, f"Keras's layers{blocks}", what="the unknown layer", names=names)
            self.report(call.path, message)
        known = block.parameters if block is not None else {}
        for name, path in references(call.arguments, call.path):
            if block is None:
                self.report(path, f"${name} stands outside a block; only the layers of a block have parameters")
            elif name not in known:
                allowed = [f"${parameter}" for parameter in known]
                self.report(path, mistake(f"${name}", allowed, what="the unknown parameter"))

    def _check_block_call(self, call: Call, block: Block) -> None:
        for name in call.arguments:
            if name not in block.parameters and name not in SHARED_ARGUMENTS:
                names = [*block.parameters, *SHARED_ARGUMENTS]
                message = mistake(name, names, what="the unknown parameter")
                self.report(f"{call.path}.{name}", message)
        for name in block.required:
            if call.arguments.get(name) is None:
                self.report(call.path, f'block "{block.name}" needs {name}')
        if WAREHOUSE in call.arguments and not any(
            name == WAREHOUSE for inner in block.calls for name, _ in references(inner.arguments, "")
        ):
            self.report(f"{call.path}.{WAREHOUSE}", f'no layer of block "{block.name}" says warehouse: $warehouse')

    def check_recursion(self) -> None:
        """Report every block that uses itself, directly or through others, or stands too deep in others."""
        blocks = self.definitions.blocks
        depths: dict[str, int] = {}

        def refuse(name: str, message: str) -> int:
            self.report(blocks[name].path, message)
            self.definitions.endless = True
            return 0

        def visit(name: str, above: tuple[str, ...]) -> int:
            if name in above:
                return refuse(name, f"the block uses itself: {' → '.join((*above[above.index(name) :], name))}")
            if name not in depths:
                inner = dict.fromkeys(call.kind for call in blocks[name].calls if call.kind in blocks)
                deep = len(above) >= MAX_NESTING
                depth = 1 if deep else 1 + max((visit(other, (*above, name)) for other in inner), default=0)
                if deep or depth > MAX_NESTING:
                    depth = refuse(name, f"blocks stand inside each other more than {MAX_NESTING} deep")
                depths[name] = depth
            return depths[name]

        for name in blocks:
            visit(name, ())


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None
