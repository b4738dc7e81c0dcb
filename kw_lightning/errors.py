"""The errors a user can cause: each says where, what was found, what is allowed and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
        # One line whatever a recipe holds, and nothing that moves the cursor of a terminal.
        return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


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
    """A run that failed for a reason outside the recipe: no disk, no data, an interrupted transfer."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the closest of `names`, or nothing when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
