"""YAML text → nodes with positions: safe, strict, and bounded.

Built on PyYAML's events instead of its objects, so that nothing is constructed that the file names, duplicate keys are
seen, and a limit stops the reading at the event that passes it. Anchors, aliases and `<<` work; an alias shares its
node, and its values count each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from kw_lightning.errors import Location, Problem, RecipeError, sentence, shown
from kw_lightning.recipe.limits import MAX_BYTES, MAX_DEPTH, MAX_KEY, MAX_PROBLEMS, MAX_TEXT, MAX_VALUES
from kw_lightning.recipe.nodes import Node
from kw_lightning.recipe.scalars import is_unicode, read_plain

_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_MERGE = "<<"
_QUOTE = "put a glob that starts with * in quotes"


def read_yaml(text: str | bytes, file: str) -> Node:
    """Return the nodes of one YAML document.

    Args:
        text: of the file.
        file: its name for messages.

    Raises:
        RecipeError: no UTF-8, no YAML, several documents, a tag, a duplicate key, **or** something past
            `kw_lightning.recipe.limits`. All mistakes that leave the rest readable are reported together.
    """
    if len(text) > MAX_BYTES:
        raise _error(file, f"a recipe may have at most {MAX_BYTES:,} bytes; this file has more")
    if isinstance(text, bytes):
        text = _decode(text, file)
    if not is_unicode(text):
        raise _error(file, "found bytes that are not UTF-8, allowed: text of Unicode characters")
    composer = _Composer(file)
    try:
        node = composer.document(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, file) from None
    if composer.problems:
        raise RecipeError(composer.problems)
    return node


def _decode(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise _error(file, f"not UTF-8: found the byte 0x{content[error.start]:02x}", line, column) from None


class _Composer:
    """Puts the events of one document together; recursion is bounded by `MAX_DEPTH`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}
        self.count = 0

    def document(self, events: Iterator[yaml.Event]) -> Node:
        node = Node(None, Location(self.file, 1, 1))
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.stop(event, "a second document starts here; a recipe is one document")
                node = self.node(next(events), events, 0)
        return node

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        assert isinstance(event, yaml.NodeEvent)
        self.check_tag(event)
        if event.anchor is not None:
            # Unfinished until the end of its value: an alias inside of it would never end.
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event)
            self.add(event, node.size)
        else:
            self.add(event, 1)
            if depth >= MAX_DEPTH:
                raise self.stop(event, f"nested deeper than {MAX_DEPTH}")
            sequence = isinstance(event, yaml.SequenceStartEvent)
            node = self.sequence(event, events, depth) if sequence else self.mapping(event, events, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: yaml.AliasEvent, depth: int) -> Node:
        name = event.anchor or ""
        node = self.anchors.get(name)
        if node is None:
            inside = name in self.anchors
            reason = "stands inside the value it names" if inside else f"has no anchor above it; {_QUOTE}"
            raise self.stop(event, f"the alias {shown('*' + name)} {reason}")
        self.add(event, node.size)
        if depth + node.depth > MAX_DEPTH:
            raise self.stop(event, f"nested deeper than {MAX_DEPTH}, aliases expanded")
        return node

    def scalar(self, event: yaml.ScalarEvent) -> Node:
        location = self.location(event)
        if len(event.value) > MAX_TEXT:
            raise self.stop(event, f"a text of {len(event.value):,} characters; at most {MAX_TEXT:,} are read")
        self.check_unicode(event)
        if not event.implicit[0]:
            return Node(event.value, location)
        try:
            return Node(read_plain(event.value), location)
        except ValueError as error:
            self.report(Problem(f"found {error}", location=location))
            return Node(0, location)

    def sequence(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        items = []
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            items.append(self.node(item, events, depth + 1))
        return Node(items, self.location(event))

    def mapping(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_event in events:
            if isinstance(key_event, yaml.MappingEndEvent):
                break
            if isinstance(key_event, yaml.ScalarEvent) and key_event.value == _MERGE and key_event.implicit[0]:
                self.merge(merged, self.node(next(events), events, depth + 1), key_event)
                continue
            key, location = self.key(key_event, events), self.location(key_event)
            node = self.node(next(events), events, depth + 1).moved(location)
            if key in entries:
                first = entries[key].key_location
                line = first.line if first else 0
                self.report(Problem(f"the key {shown(key)} stands here again, first in line {line}", location=location))
            else:
                entries[key] = node
        return Node({**merged, **entries}, self.location(event))

    def key(self, event: yaml.Event, events: Iterator[yaml.Event]) -> str:
        """Return a key as it is written: `1:` and `on:` are texts, too."""
        if not isinstance(event, yaml.ScalarEvent):
            raise self.stop(event, sentence("a key that is no text", "a text"))
        self.check_tag(event)
        self.add(event, 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = Node(event.value, self.location(event))
        if len(event.value) > MAX_KEY:
            raise self.stop(event, f"a key of {len(event.value):,} characters; at most {MAX_KEY} are read")
        self.check_unicode(event)
        return event.value

    def merge(self, merged: dict[str, Node], node: Node, event: yaml.Event) -> None:
        """Add the keys of `<<: *name` or `<<: [*name, *other]`; the first map that has a key wins."""
        for part in node.value if isinstance(node.value, list) else [node]:
            if not isinstance(part.value, dict):
                self.report(Problem('"<<" takes a map, or a list of maps', location=self.location(event)))
                return
            for key, child in part.value.items():
                merged.setdefault(key, child)

    def check_unicode(self, event: yaml.ScalarEvent) -> None:
        if not is_unicode(event.value):  # libyaml refuses it by itself
            raise self.stop(event, sentence("half of a surrogate pair", "text of Unicode characters"))

    def check_tag(self, event: yaml.Event) -> None:
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            name = tag.replace("tag:yaml.org,2002:", "!!")
            self.report(Problem(f"found the tag {shown(name)}; a recipe has no tags", location=self.location(event)))

    def report(self, problem: Problem) -> None:
        self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise RecipeError(self.problems)

    def add(self, event: yaml.Event, values: int) -> None:
        self.count += values
        if self.count > MAX_VALUES:
            raise self.stop(event, f"more than {MAX_VALUES:,} values, aliases expanded")

    def location(self, event: yaml.Event) -> Location:
        mark = event.start_mark
        return Location(self.file, mark.line + 1, mark.column + 1) if mark else Location(self.file, 1, 1)

    def stop(self, event: yaml.Event, message: str) -> RecipeError:
        return RecipeError([*self.problems, Problem(message, location=self.location(event))])


def _syntax_error(error: yaml.YAMLError, text: str, file: str) -> RecipeError:
    """Return PyYAML's finding in one line, with its place."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark) is not None:
        line, column = mark.line + 1, mark.column + 1
        start = error.context_mark
        context = f"{error.context} that starts in line {start.line + 1}" if error.context and start else error.context
        # libyaml's own limit, in PyYAML 6.0.4 and later: its scanner gets there before the values are counted.
        if error.problem == "exceeded maximum nesting depth":
            return _error(file, f"nested deeper than {MAX_DEPTH}", line, column)
        message = ", ".join(part for part in (context, error.problem) if part)
    else:  # a control character: only the offset is known
        position = getattr(error, "position", 0) or 0
        line, column = text.count("\n", 0, position) + 1, position - (text.rfind("\n", 0, position) + 1) + 1
        message = str(getattr(error, "reason", "") or "it cannot be read")
    lines = text.splitlines()
    shown = lines[line - 1] if line <= len(lines) else ""
    hint = "; indent with spaces, a tab is not allowed there" if "\t" in shown else ""
    if shown[column - 2 : column - 1] == "*" or shown[column - 1 : column] == "*":
        hint = f"; {_QUOTE}"
    return _error(file, f"not YAML: {' '.join(message.split())}{hint}", line, column)


def _error(file: str, message: str, line: int = 1, column: int = 1) -> RecipeError:
    return RecipeError(Problem(message, location=Location(file, line, column)))
