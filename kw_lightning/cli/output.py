"""Consoles for the commands: colour and the terminal's width on a terminal, plain and wide lines in a pipe."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import IO

from rich.console import Console

PIPED_WIDTH = 160  # a file or a pipe has no width of its own; rich would fold tables at 80


def console() -> Console:
    """Return the console of standard output."""
    return _console(sys.stdout)


def error_console() -> Console:
    """Return the console of standard error, for messages that are not the command's result."""
    return _console(sys.stderr)


def warn(message: str | None) -> None:
    """Print what the user should know on standard error, in one line; nothing where there is nothing to say."""
    if message is not None:
        error_console().print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


@contextmanager
def counting(action: str, total: int, *, bar: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield what is to be called with how many more are done; a terminal shows a bar where one is wanted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = error_console()
    if not (bar and screen.is_terminal):  # rich before 14.3 ends a bar that it does not show with an empty line
        yield lambda count: None
        return
    columns = (TextColumn(action), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def write_any_text() -> None:
    """Let the standard streams write `?` for what their encoding does not have, as × in ASCII, and not fail.

    One that was closed before, as by a daemon, writes nowhere; its number is then that of no other file.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def forget_output() -> None:
    """Send what is still to be written to standard output nowhere, when nobody reads it any more or it has no room."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _console(stream: IO[str]) -> Console:
    # Brackets are a part of names, as of selectors and folders; rich would take them for its markup.
    return _Console(file=stream, width=None if stream.isatty() else PIPED_WIDTH, markup=False)


class _Console(Console):
    """A console that leaves to the command what happens when nobody reads its output; rich ends the process."""

    def on_broken_pipe(self) -> None:
        """Raise the error of the pipe."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
