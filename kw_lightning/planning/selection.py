"""Which layers a recipe means: one pure function from selectors to layers.

Names are matched as `named_modules()` prints them. A glob is `fnmatch`'s: `*` stands for any characters, dots included,
`?` for one, `[01]` for one of a set. So `layer1.*.conv?` means `layer1.0.conv1` and `layer1.*` every layer in `layer1`;
a network that is itself one layer has the name "", which `*` means too.

A name without wildcards must be a convolution or linear layer. A glob picks those among what it matches and leaves
the rest; it must find at least one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kw_lightning.errors import Problem, mistake, sentence, times
from kw_lightning.planning.network import ALLOWED, KINDS, Layer, Network
from kw_lightning.recipe.types import Document, Selector, Warehouse

# Finding the nearest name costs milliseconds: a recipe with 10⁵ wrong names shall not take minutes.
NEAREST_LIMIT = 50
FABRICS = "_forward_module"  # where Lightning Fabric keeps the network that it wraps


@dataclass(frozen=True)
class Choice:
    """A layer that a warehouse takes, whole or in part.

    Attributes:
        rows: the output channels (from, to) that become dynamic; None means all.
    """

    layer: Layer
    rows: tuple[int, int] | None = None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Return [out_channels, in_channels / groups, *kernel_size] of what becomes dynamic."""
        if self.rows is None:
            return self.layer.kernel_shape
        return (self.rows[1] - self.rows[0], *self.layer.kernel_shape[1:])

    @property
    def name(self) -> str:
        """Return the layer's name, with the rows as a slice behind it."""
        return self.layer.name if self.rows is None else f"{self.layer.name}[{self.rows[0]}:{self.rows[1]}]"


def select(
    network: Network, warehouses: Sequence[Warehouse], document: Document
) -> tuple[dict[str, tuple[Choice, ...]], list[Problem]]:
    """Return the layers of each warehouse, in module order, and every problem found.

    Problems: a selector or an `exclude` that matches nothing; a name that is no convolution or linear layer or that
    cannot be made dynamic; conditions that leave nothing; a slice that does not fall between output channels;
    **or** a layer in two warehouses. Names that are those of a submodule are one problem, not one each.
    """
    selectors = [selector for warehouse in warehouses for selector in warehouse.layers]
    part = _meant_part(network, selectors)
    if part is not None:
        allowed = f'those of the whole network, as "{part}.{selectors[0].name}"'
        hint = f'or convert that part alone, as KWCallback(…, module="{part}") does'
        if part == FABRICS:
            allowed, hint = "a network before Fabric's setup", "convert it there, before its optimizer is made"
        message = sentence(f'the names of layers of "{part}"', allowed, hint)
        return {warehouse.name: () for warehouse in warehouses}, [document.problem(selectors[0].path, message)]
    finder = _Finder(network, document)
    chosen: dict[str, tuple[Choice, ...]] = {}
    for warehouse in warehouses:
        found: dict[str, Choice] = {}
        for selector in warehouse.layers:
            for choice in finder.find(selector):
                if choice.name not in found:
                    finder.claim(choice, warehouse.name, selector)
                    found[choice.name] = choice
        chosen[warehouse.name] = _in_module_order(network, list(found.values()))
    return chosen, finder.problems


def _meant_part(network: Network, selectors: Sequence[Selector]) -> str | None:
    """Return the submodule in which all selectors find layers, where at least one finds none in the whole network."""
    matches = [matcher(selector.name) for selector in selectors]
    names = [name for layer in network.layers for name in layer.names]
    if all(any(map(match, names)) for match in matches):
        return None
    first = next(match for match in matches if not any(map(match, names)))
    ends = [(name, at) for name in names for at, character in enumerate(name) if character == "."]
    parts = dict.fromkeys(name[:at] for name, at in ends if first(name[at + 1 :]))
    for part in sorted(parts, key=len):
        inside = [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]
        if all(any(map(match, inside)) for match in matches):
            return part
    return None


class _Finder:
    def __init__(self, network: Network, document: Document) -> None:
        self.network = network
        self.document = document
        self.problems: list[Problem] = []
        self.claims: dict[str, list[tuple[Choice, str]]] = {}

    def report(self, path: str, message: str) -> None:
        self.problems.append(self.document.problem(path, message))

    def report_pattern(self, path: str, pattern: str, allowed: str) -> None:
        near = len(self.problems) < NEAREST_LIMIT
        names = [name for layer in self.network.layers for name in layer.names] if near else ()
        what = "the unmatched glob" if is_glob(pattern) else "the unknown name"
        self.report(path, mistake(pattern, allowed, what=what, names=names))

    def find(self, selector: Selector) -> list[Choice]:
        if selector.type is not None and selector.type not in KINDS:
            self.report(f"{selector.path}.type", mistake(selector.type, KINDS, what="the unknown type"))
            return []
        matches = matcher(selector.name)
        named = [layer for layer in self.network.layers if any(map(matches, layer.names))]
        if not named:
            self._report_no_layer(selector)
            return []
        kept = self._without_excluded(selector, named)
        for condition, text in _conditions(selector):
            left = [layer for layer in kept if condition(layer)]
            if kept and not left:
                found = "; ".join(sorted({_describe(layer) for layer in kept})[:4])
                self.report(selector.path, f'"{selector.name}" matches {len(kept)} layers: {sentence(found, text)}')
            kept = left
        able = [layer for layer in kept if layer.refusal is None]
        if kept and not able:
            layer = kept[0]
            self.report(selector.path, f'"{layer.name}" cannot be made dynamic: {layer.refusal}')
        choices = [self._cut(selector, layer) for layer in able]
        return [choice for choice in choices if choice is not None]

    def claim(self, choice: Choice, warehouse: str, selector: Selector) -> None:
        for other, owner in self.claims.get(choice.layer.name, []):
            if _overlap(choice.rows, other.rows):
                where = f'warehouse "{owner}" already' if owner != warehouse else "this warehouse twice"
                self.report(selector.path, f'layer "{choice.name}" is in {where}; a layer draws on one warehouse')
                return
        self.claims.setdefault(choice.layer.name, []).append((choice, warehouse))

    def _report_no_layer(self, selector: Selector) -> None:
        name, modules = selector.name, self.network.modules
        if name in modules:
            kind = modules[name]
            inside = any(layer.name.startswith(f"{name}.") for layer in self.network.layers)
            hint = f'; "{name}.*" means the layers inside it' if inside else ""
            self.report(selector.path, f'"{name}" is a {kind}, and no {ALLOWED}{hint}')
            return
        matches = matcher(name)
        others = [module for module in modules if matches(module)]
        if others:
            self.report(
                selector.path,
                f'"{name}" matches {len(others)} modules, and none is a {ALLOWED}: '
                f'the first is "{others[0]}", a {modules[others[0]]}',
            )
        else:
            self.report_pattern(selector.path, name, "names and globs of layers of the network")

    def _without_excluded(self, selector: Selector, layers: list[Layer]) -> list[Layer]:
        kept = layers
        for index, pattern in enumerate(selector.exclude):
            matches = matcher(pattern)
            left = [layer for layer in kept if not any(map(matches, layer.names))]
            if not any(any(map(matches, layer.names)) for layer in layers):
                path = f"{selector.path}.exclude[{index}]"
                self.report_pattern(path, pattern, f'names and globs of layers of "{selector.name}"')
            kept = left
        if not kept:
            self.report(selector.path, f'all {len(layers)} layers that "{selector.name}" matches are excluded')
        return kept

    def _cut(self, selector: Selector, layer: Layer) -> Choice | None:
        if selector.part is None:
            return Choice(layer)
        start, stop = (part * layer.out_channels for part in selector.part)
        slice_ = f"[{selector.part[0]}:{selector.part[1]}]"
        if layer.groups > 1:
            self.report(selector.path, f'"{layer.name}" has {layer.groups} groups; only a layer of one can be cut')
        elif start.denominator > 1 or stop.denominator > 1:
            what = f'the channels {float(start):g} to {float(stop):g}, which are {slice_} of "{layer.name}"'
            self.report(selector.path, sentence(what, f"whole ones of its {layer.out_channels} output channels"))
        elif not 0 <= start < stop <= layer.out_channels:
            self.report(selector.path, sentence(f'the slice {slice_} of "{layer.name}"', "0 ≤ from < to ≤ 1"))
        elif start == 0 and stop == layer.out_channels:
            return Choice(layer)
        else:
            return Choice(layer, (int(start), int(stop)))
        return None


def excluded_by(layer: Layer, warehouses: Sequence[Warehouse]) -> str | None:
    """Return the `exclude` that keeps a layer out of a warehouse, as a message; None where there is none."""
    for warehouse in warehouses:
        for selector in warehouse.layers:
            if any(map(matcher(selector.name), layer.names)):
                for pattern in selector.exclude:
                    if any(map(matcher(pattern), layer.names)):
                        return f'excluded from warehouse "{warehouse.name}" by "{pattern}"'
    return None


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return the test of whether a name is meant by a name or glob."""
    if not is_glob(pattern):
        return lambda name: name == pattern
    expression = re.compile(fnmatch.translate(pattern))
    return lambda name: expression.match(name) is not None


def is_glob(pattern: str) -> bool:
    """Return whether a pattern has wildcards."""
    return any(character in pattern for character in "*?[")


def enclosing(name: str) -> list[str]:
    """Return a name and those of the modules around it: `a.b.weight`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _conditions(selector: Selector) -> Iterable[tuple[Callable[[Layer], bool], str]]:
    if selector.type is not None:
        yield (lambda layer: layer.type == selector.type), f"type {selector.type}"
    if selector.kernel_size is not None:
        size = selector.kernel_size

        def has_size(layer: Layer) -> bool:
            # One number means the same in every dimension.
            sides = size * len(layer.kernel_size) if len(size) == 1 else size
            return bool(layer.kernel_size) and layer.kernel_size == sides

        yield has_size, f"kernel_size {times(size)}"
    if selector.min_channels is not None:
        least = selector.min_channels
        yield (
            lambda layer: min(layer.in_channels, layer.out_channels) >= least,
            f"at least {least} input and output channels",
        )


def _describe(layer: Layer) -> str:
    size = "" if not layer.kernel_size else " " + times(layer.kernel_size)
    return f"{layer.type}{size} {layer.in_channels} → {layer.out_channels}"


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


def _in_module_order(network: Network, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    order = {layer.name: index for index, layer in enumerate(network.layers)}
    return tuple(sorted(choices, key=lambda choice: (order[choice.layer.name], choice.rows or (0, 0))))


__all__ = ["Choice", "enclosing", "excluded_by", "is_glob", "matcher", "select"]
