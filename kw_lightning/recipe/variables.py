"""`vars`: `${name}` stands for a value, alone with its type or inside a text; `$${` writes a `${`."""

from __future__ import annotations

import re
from typing import Any

from kw_lightning.errors import Problem, mistake, shown
from kw_lightning.recipe.limits import MAX_PROBLEMS, MAX_TEXT, MAX_VALUES
from kw_lightning.recipe.nodes import Node, join

_REFERENCE = re.compile(r"\$?\$\{([^{}]*)\}")


def substitute(root: Node, problems: list[Problem]) -> Node:
    """Return a recipe with its `vars` filled in, and without them.

    Values of `vars` hold no `${…}` themselves, so nothing can refer to itself. A value put in alone keeps the place
    where `vars` has it.
    """
    assert isinstance(root.value, dict)
    variables = root.value.get("vars", Node({}))
    if not isinstance(variables.value, dict):
        return root  # the schema refuses it
    for path, node in variables.walk("vars"):
        if isinstance(node.value, str) and any(match.group(0)[:2] != "$$" for match in _REFERENCE.finditer(node.value)):
            problems.append(Problem("a value of vars cannot use another one", path, node.place))
            return root
    filler = _Filler(variables.value, problems)
    return filler.fill(Node({k: v for k, v in root.value.items() if k != "vars"}, root.location), "")


def escape(value: Any) -> Any:
    """Return plain data whose texts mean themselves where `${` is read."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"\$\{[^{}]*\}", r"$\g<0>", value) if isinstance(value, str) else value


class _Filler:
    def __init__(self, variables: dict[str, Node], problems: list[Problem]) -> None:
        self.variables = variables
        self.problems = problems
        self.values = 0
        self.characters = 0
        self.unknown: set[tuple[str, str]] = set()

    def fill(self, node: Node, path: str) -> Node:
        if isinstance(node.value, dict):
            children = {key: self.fill(child, join(path, key)) for key, child in node.value.items()}
            return Node(children, node.location, node.key_location)
        if isinstance(node.value, list):
            items = [self.fill(child, join(path, index)) for index, child in enumerate(node.value)]
            return Node(items, node.location, node.key_location)
        if isinstance(node.value, str) and "${" in node.value:
            return self.text(node, node.value, path)
        return node

    def text(self, node: Node, text: str, path: str) -> Node:
        references = list(_REFERENCE.finditer(text))
        alone = len(references) == 1 and references[0].group(0) == text and not text.startswith("$$")
        if alone and (value := self.value(references[0], node, path)) is not None:
            before, self.values = self.values, self.values + value.size
            if self.values > MAX_VALUES:
                if before <= MAX_VALUES:  # said once
                    self.report(f"more than {MAX_VALUES:,} values, vars filled in", node, path)
                return node
            return value.moved(node.key_location)
        filled = _REFERENCE.sub(lambda match: self.written(match, node, path), text)
        self.characters += len(filled)
        return Node(filled, node.location, node.key_location)

    def written(self, match: re.Match[str], node: Node, path: str) -> str:
        if match.group(0).startswith("$$"):
            return match.group(0)[1:]
        value = self.value(match, node, path)
        if value is None:
            return ""
        if isinstance(value.value, dict | list):
            self.report(f"{shown(match.group(1))} is no text or number, and can only stand alone", node, path)
            return ""
        text = "" if value.value is None else str(value.value)
        text = text.lower() if isinstance(value.value, bool) else text
        self.characters += len(text)
        if self.characters > MAX_TEXT:
            self.report(f"more than {MAX_TEXT:,} characters, vars filled in", node, path)
            return ""
        return text

    def value(self, match: re.Match[str], node: Node, path: str) -> Node | None:
        name = match.group(1)
        if name not in self.variables:
            if (name, path) not in self.unknown and len(self.unknown) < MAX_PROBLEMS:
                # Looking for the nearest takes time for each name: not for a file that is all mistakes.
                near = self.variables if len(self.unknown) < 10 else ()
                self.unknown.add((name, path))
                self.report(mistake(name, "a name of vars", what="the unknown variable", names=near), node, path)
            return None
        return self.variables[name]

    def report(self, message: str, node: Node, path: str) -> None:
        problem = Problem(message, path, node.place)
        if problem not in self.problems[-1:] and len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
