"""The errors a user can cause: each says where, what was found, what is allowed and the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

_SHOWN = 60
"""Characters of a value that a message shows."""
_COMPARED = 80
"""Names longer than this are not compared with others: that takes quadratic time, and finds nothing."""
_IN_OPTIONS = ContextVar("in_options", default=False)


@dataclass(frozen=True)
class Location:
    """A place in a recipe file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake of a recipe.

    Attributes:
        message: what was found and what is allowed, in one line, with the nearest valid name if there is one.
        path: the key path inside the recipe, as `warehouses.stage1.layers[0]`.
        location: where it stands, if it stands in a file.
    """

    message: str
    path: str = ""
    location: Location | None = None

    def __str__(self) -> str:
        text = ": ".join(str(part) for part in (self.location, self.path, self.message) if part)
        return printable(text)


class KWError(Exception):
    """Base of every error that the user can cause; shown without a traceback by the commands."""

    exit_code = 1


class RecipeError(KWError, ValueError):
    """A recipe that cannot be used; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class RunError(KWError, RuntimeError):
    """A run that failed for a reason outside the recipe: no disk, no data, an interrupted transfer.

    Args:
        lines: what is said, one line each whatever a file or a name holds.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def printable(text: str) -> str:
    """Return a text as one line in which nothing moves the cursor of a terminal."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def mistake(
    value: object, allowed: str | Iterable[str], *, what: str = "", names: Iterable[str] | None = None, hint: str = ""
) -> str:
    """Return the sentence that every mistake is told in: `found WHAT "b", allowed: a, bb; did you mean "bb"?`.

    Args:
        value: what was found; shown as YAML writes it.
        allowed: what is allowed: in words, or all the names.
        what: what the value is, where its place does not say it, as "the unknown key".
        names: valid names, of which the nearest is offered; by default those of `allowed`.
        hint: offered in place of a name.

    Example:
        >>> mistake("mix_kernel", ["auto", "mix_kernels"], what="the unknown engine")
        'found the unknown engine "mix_kernel", allowed: auto, mix_kernels; did you mean "mix_kernels"?'
    """
    if not isinstance(allowed, str):
        allowed = list(allowed)
        names = allowed if names is None else names
        allowed = ", ".join(allowed) or "none"
    hint = hint or (did_you_mean(value, names or ()) if isinstance(value, str) else "")
    return sentence(f"{what} {shown(value)}" if what else shown(value), allowed, hint)


def sentence(found: str, allowed: str, hint: str = "") -> str:
    """Return what `mistake` does, for what was found in words."""
    return f"found {found}, allowed: {allowed}{f'; {hint}' if hint else ''}"


def kind(value: object) -> str:
    """Return in words what stands in the place of something else.

    Example:
        >>> kind(3), kind(int)
        ('an object of int', 'the class int')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Let messages speak of a command's options, where without it they speak of a function's arguments."""
    before = _IN_OPTIONS.set(True)
    try:
        yield
    finally:
        _IN_OPTIONS.reset(before)


def argument(name: str, value: str | Path | list[str] | None = None) -> str:
    """Return an argument as whoever reads the message gives it.

    Example:
        >>> argument("resume", "runs/a"), argument("allow_python", ["team"]), argument("output")
        ('resume="runs/a"', 'allow_python=["team"]', 'output=…')
        >>> with in_options():
        ...     argument("resume", "runs/a"), argument("allow_python", ["team"]), argument("output")
        ('--resume runs/a', '--allow-python team', '--output')
    """
    if _IN_OPTIONS.get():
        values = [] if value is None else value if isinstance(value, list) else [value]
        return " ".join([f"--{name.replace('_', '-')}", *map(str, values)])
    return f"{name}={'…' if value is None else json.dumps(value, default=str, ensure_ascii=False)}"


def did_you_mean(name: str, names: Iterable[str], least: float = 0.5) -> str:
    """Return `did you mean "x"?` for the closest of `names`, or nothing when none is close.

    Args:
        name: what was found.
        names: what is allowed.
        least: how alike the two have to be, by difflib's ratio from 0 to 1.
    """
    if len(name) > _COMPARED:
        return ""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=least)
    return f'did you mean "{matches[0]}"?' if matches else ""


def listed(texts: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """Return the first texts in a row, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more


def needs(what: str, packages: str, extra: str, error: ImportError | None = None) -> str:
    """Return that something needs packages, and the extra of this package that brings them.

    Args:
        what: what needs them.
        packages: by the names that are imported, as "onnx and onnxscript".
        extra: that brings them.
        error: what came of importing them; told where one is there, but broken.

    Example:
        >>> needs("int8", "onnx and onnxruntime", "onnx")
        "int8 needs onnx and onnxruntime: pip install 'kw-lightning[onnx]'"
    """
    told = f"{what} needs {packages}: pip install 'kw-lightning[{extra}]'"
    if error is None or (isinstance(error, ModuleNotFoundError) and error.name in packages.split()):
        return told
    return f"{told}; what is there cannot be imported: {first_line(error)}"


def times(shape: Iterable[int]) -> str:
    """Return a shape as `64×64×1×1`."""
    return "×".join(map(str, shape))


def shown(value: object) -> str:
    """Return a value as a message shows it: a text in quotes, a list by its length, a map by its keys.

    The words are YAML's (`true`), the length is bounded, and no character moves a terminal's cursor.
    """
    match value:
        case None:
            return "nothing"
        case Mapping():
            keys = ", ".join(str(key) if str(key).isprintable() else json.dumps(key) for key in list(value)[:_SHOWN])
            return f"a map with {_shortened(keys)}" if value else "an empty map"
        case list() | tuple():
            return f"a list of {len(value):,} {'value' if len(value) == 1 else 'values'}" if value else "an empty list"
        case str():
            return json.dumps(_shortened(value), ensure_ascii=not value.isprintable())
        case bool() | int() | float():
            return _shortened(json.dumps(value))
        case _:
            return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first line of what an exception says, or its name where it says nothing."""
    if isinstance(error, UnpicklingError):  # torch's words advise to run the file's code
        return "it holds other things than tensors, or is damaged; no code of a file is run"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
