"""Consoles for the commands: colour and the terminal's width on a terminal, plain and wide lines in a pipe."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console

PIPED_WIDTH = 160  # a file or a pipe has no width of its own; rich would fold tables at 80


def console() -> Console:
    """Return the console of standard output."""
    return _console(sys.stdout)


def error_console() -> Console:
    """Return the console of standard error, for messages that are not the command's result."""
    return _console(sys.stderr)


def _console(stream: IO[str]) -> Console:
    return Console(file=stream, width=None if stream.isatty() else PIPED_WIDTH)
